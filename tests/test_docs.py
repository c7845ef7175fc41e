"""The documents against the code: commands, keys, links, the generated page, the table of algorithms."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from mindrlhf import config
from mindrlhf.cli.main import COMMANDS
from mindrlhf.cli.train import JOBS
from mindrlhf.config import InferenceConfig, load_config
from mindrlhf.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
CONFIGS = {name: getattr(config, job.config) for name, job in JOBS.items()}
CONFIGS |= dict.fromkeys(("generate", "eval", "chat", "score"), InferenceConfig)
SECTIONS = "model|data|warmup|rollout|algorithm|optimizer|trainer|logging|training|loss|steps|distillation|sampling"
MODULES = {name: module for name, _, module in COMMANDS}

sys.path.insert(0, str(ROOT / "docs"))
import make_configuration  # noqa: E402
import make_families  # noqa: E402


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(text, *languages):
    """The contents of fenced code blocks in these languages."""
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def commands(text):
    """Shell lines, continued ones joined: of code blocks, indented code, and `mindrlhf ...` in the text."""
    code = "\n".join(blocks(text, "sh", "bash", "shell"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    prose = re.sub(r"<!--.*?-->", "", prose, flags=re.S)
    code += "\n" + "\n".join(line for line in prose.splitlines() if line.startswith("    "))
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    code += "\n" + "\n".join(span for span in spans if re.match(r"(mindrlhf|make) ", span))
    lines = code.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines if is_command(line)) if words]


def is_command(line):
    return re.match(r"(\.venv/bin/)?(mindrlhf|make|python|pytest)\b", line.strip()) is not None


def without_fences(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def test_there_are_documents():
    assert {"README.md", "README_CN.md", "docs/configuration.md"} <= {name_of(path) for path in DOCUMENTS}
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 8


def test_configuration_page_is_what_the_script_makes():
    assert make_configuration.TARGET.read_text(encoding="utf-8") == make_configuration.configuration(), (
        "run: python docs/make_configuration.py"
    )


def test_every_key_has_a_meaning():
    page = make_configuration.configuration()
    assert not re.findall(r"^\| `\w+` .*\|  \|$", page, re.M)
    for name in make_configuration.MEANINGS:
        cls, field = name.split(".")
        comments = make_configuration._comments(getattr(config, cls))
        assert field in comments and not comments[field], f"{name}: config.py has a comment; remove it from MEANINGS"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for words in commands(path.read_text(encoding="utf-8")):
        program, rest = Path(words[0]).name, words[1:]
        if program == "make":
            wanted = [word for word in rest if "=" not in word]
            assert set(wanted) <= set(targets), f"{name_of(path)}: no target for {words}"
        elif program == "mindrlhf":
            check_command(path, rest)
        else:
            scripts = [word for word in rest if word.endswith(".py") or word.startswith(("tests/", "examples/"))]
            missing = [word for word in scripts if not (ROOT / word).exists()]
            assert not missing, f"{name_of(path)}: {missing} not there"


def check_command(path, words):
    """Its options are parsed by the command's own parser, its overrides read into its own configuration."""
    where = f"{name_of(path)}: mindrlhf {' '.join(words)}"
    assert words and words[0] in MODULES, where
    if len(words) == 1:  # the command's name alone
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.set_defaults(command=words[0])
    importlib.import_module(MODULES[words[0]]).add_arguments(parser)
    arguments = parser.parse_intermixed_args(words[1:])
    config = getattr(arguments, "config", None)
    if words[0] in CONFIGS and config != "x.yaml":  # x.yaml is any
        load_config(CONFIGS[words[0]], config and ROOT / config, arguments.overrides)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_yaml_blocks_are_configurations(path, tmp_path):
    for number, block in enumerate(blocks(path.read_text(encoding="utf-8"), "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        assert any(parses(cls, file) for cls in CONFIGS.values()), f"{name_of(path)}: no job takes\n{block}"


def parses(cls, file):
    try:
        return load_config(cls, file)
    except UserError:
        return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_python_blocks_compile(path):
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        compile(block, name_of(path), "exec")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_keys_exist(path):
    """`section.key`, `section.key=value` and `section.key: value` in the text."""
    known = set().union(*(make_configuration.keys(cls) for cls in CONFIGS.values()))
    for span in re.findall(r"`([^`\n]+)`", without_fences(path.read_text(encoding="utf-8"))):
        match = re.fullmatch(rf"((?:{SECTIONS})(?:\.[a-z_0-9]+)+)(?:(?:=|: ).*)?", span)
        if match:
            assert match[1] in known, f"{name_of(path)}: `{span}`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_resolve(path):
    text = without_fences(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)}: {target}"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{name_of(path)}: {target}"


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_fences(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_named_in_the_text_exist(path):
    """`mindrlhf/x.py`, `tests/x.py`, `examples/x`, `docs/x`, `benchmarks/x`."""
    text = without_fences(path.read_text(encoding="utf-8"))
    for span in re.findall(r"`((?:mindrlhf|tests|examples|docs|benchmarks)/[\w./-]+)`", text):
        made = span.startswith(("examples/grpo/data/Qwen", "examples/grpo/data/gsm8k"))  # the user's downloads
        assert made or (ROOT / span).exists(), f"{name_of(path)}: `{span}`"


def test_steps_of_the_examples():
    """`runs/NAME/checkpoints/step-N` is where the example whose output is runs/NAME ends."""
    last = {}
    for file in (ROOT / "examples").rglob("*.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        last[values["output"]] = values["trainer"].get("steps")
    for path in (*DOCUMENTS, *(ROOT / "examples").rglob("*.yaml")):
        for run, number in re.findall(r"(runs/\w+)/checkpoints/step-(\d{6})", path.read_text(encoding="utf-8")):
            if run in last:
                assert int(number) in (0, last[run]), f"{name_of(path)}: {run} ends at {last[run]}, not {number}"


def test_every_algorithm_is_described():
    from mindrlhf.losses import POLICY_LOSSES
    from mindrlhf.preference_losses import PREFERENCE_LOSSES
    from mindrlhf.trainer.algorithms import ALGORITHMS

    text = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in (*ALGORITHMS, *POLICY_LOSSES, *PREFERENCE_LOSSES))
    assert all(row.paper in text for row in PREFERENCE_LOSSES.values())
    for row in ALGORITHMS.values():
        papers = re.findall(r"(?:arXiv|doi) (\d+\.[\d/BF]+)", row.paper)
        assert papers and all(f"{paper})" in text for paper in papers)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_figure_is_missing(path):
    assert not re.findall(r"<!--FIGURE: [^>]*-->", path.read_text(encoding="utf-8"))


def test_the_table_of_families():
    """Every family and fixture has its row, and what was measured is within the limits of the tests."""
    from mindrlhf.models.families import FAMILIES

    text = make_families.TARGET.read_text(encoding="utf-8")
    made = text.partition(make_families.START)[2].partition(make_families.END)[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in made[2:]]
    assert [row[0] for row in rows] == [name for name, _, _ in make_families.ROWS], "run: python docs/make_families.py"
    assert {row[1] for row in rows} == {f"`{name}`" for name in FAMILIES}
    errors, done = len(make_families.ERRORS), len(make_families.DONE)
    for row in rows:
        assert all(float(cell) <= 1e-5 for cell in row[2 : 2 + errors]), row
        assert row[2 + errors : 2 + errors + done] == ["yes"] * done, row
    fixtures = {path.parent.name for path in (ROOT / "tests" / "fixtures").glob("*/generation_config.json")}
    assert fixtures | {"baichuan2"} == {fixture for _, fixtures, _ in make_families.ROWS for fixture in fixtures}


def test_errors_are_rounded_up():
    found = [make_families.rounded_up(error) for error in (0.0, 1e-6, 1.01e-6, 4.9e-7, 5.1e-7)]
    assert found == ["0", "1e-6", "2e-6", "5e-7", "1e-6"]
