"""mindrlhf/cli/main.py and env: fast help, exit codes, one-line errors."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest

import mindrlhf.__main__  # noqa: F401 - importing it runs nothing
from mindrlhf.cli import env
from mindrlhf.cli import main as command_line
from mindrlhf.cli.main import COMMANDS, main
from mindrlhf.errors import UserError

HEAVY = ("mindspore", "transformers", "matplotlib", "mindformers", "tensorboardX")


@pytest.fixture
def command(monkeypatch):
    """Give `mindrlhf grpo` another body, which gets the parsed arguments."""

    def replace(body):
        module = types.ModuleType("stub", "What the stub does.")
        module.run = body

        def add_arguments(parser):
            parser.add_argument("--config")
            parser.add_argument("overrides", nargs="*")

        module.add_arguments = add_arguments
        monkeypatch.setitem(sys.modules, "stub", module)
        monkeypatch.setattr(command_line, "COMMANDS", (("grpo", "stub", "stub"),))

    return replace


@pytest.mark.parametrize(
    "name", ["", *(name for name, _, module in COMMANDS if importlib.util.find_spec(module) is not None)]
)
def test_help_is_light(name):
    program = (
        "import sys\n"
        "from mindrlhf.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('HEAVY', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    arguments = [name, "--help"] if name else ["--help"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(f"usage: mindrlhf {name}".rstrip())
    assert done.stdout.endswith("HEAVY []\n")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name, _, _ in COMMANDS)


def test_nothing_given_shows_help_and_fails(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("mindrlhf ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpro", "unknown command 'gpro'; did you mean 'grpo'?"),
        ("xyz", "unknown command 'xyz'; there are " + ", ".join(name for name, *_ in COMMANDS)),
    ],
)
def test_misspelt_command(capsys, name, message):
    assert main([name]) == 2
    assert capsys.readouterr() == ("", f"mindrlhf: error: {message}\n")


def test_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["env", "--jsn"])
    assert end.value.code == 2
    assert "--jsn" in capsys.readouterr().err


def test_overrides_before_and_after_options(command):
    seen = []
    command(lambda arguments: seen.append(arguments) or 0)
    assert main(["grpo", "a=1", "--config", "x.yaml", "b.c=2"]) == 0
    assert (seen[0].config, seen[0].overrides) == ("x.yaml", ["a=1", "b.c=2"])


def test_exit_code_of_the_command(command):
    command(lambda arguments: 1)
    assert main(["grpo"]) == 1


def test_user_error_is_one_line(command, capsys):
    def fail(arguments):
        raise UserError("job.yaml:3: seed:\n  wrong")

    command(fail)
    assert main(["grpo"]) == 2
    assert capsys.readouterr() == ("", "mindrlhf: error: job.yaml:3: seed: wrong\n")


def test_interrupt_is_one_line(command, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    command(interrupt)
    assert main(["grpo"]) == 130
    assert capsys.readouterr() == ("", "mindrlhf: interrupted\n")


def test_a_bug_keeps_its_traceback(command):
    def fail(arguments):
        raise ValueError("a bug")

    command(fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["grpo"])


def fake_packages(monkeypatch, requirements, versions):
    def version(name):
        if name not in versions:
            raise env.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: requirements)
    monkeypatch.setattr(env.importlib.metadata, "version", version)


GOOD = {"mindrlhf": "0.1.0", "mindspore": "2.9.0", "numpy": "1.26.4", "wandb": "1.0"}
REQUIREMENTS = ["mindspore==2.9.0", "numpy<2", 'pytest==1; extra == "dev"']


def test_env_of_a_good_machine(monkeypatch, capsys):
    fake_packages(monkeypatch, REQUIREMENTS, GOOD)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "mindspore     2.9.0" in text
    assert "wandb         1.0" in text
    assert "pip install swanlab" in text
    assert "problems" not in text


def test_env_names_what_does_not_fit(monkeypatch, capsys):
    versions = {**GOOD, "numpy": "2.1.0"}
    del versions["mindspore"]
    fake_packages(monkeypatch, REQUIREMENTS, versions)
    assert main(["env", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [
        'mindspore: missing: pip install "mindspore==2.9.0"',
        'numpy: 2.1.0 does not fit: pip install "numpy<2"',
    ]
    assert report["mindspore"] is None
    assert report["optional"] == {"wandb": "1.0", "swanlab": None, "math-verify": None}
    assert report["cores"] >= 1


def test_env_from_a_source_tree(monkeypatch, capsys):
    def missing(name):
        raise env.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(env.importlib.metadata, "requires", missing)
    monkeypatch.setattr(env.importlib.metadata, "version", missing)
    assert main(["env"]) == 1
    assert "mindrlhf is not installed, so its requirements are unknown: pip install -e ." in capsys.readouterr().out
