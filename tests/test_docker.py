"""docker/: what the linter of `make lint` cannot see: that files are there, and what a container is given."""

import os
import re
import shlex
import subprocess

import pytest

from tests.processes import ROOT

DOCKER = ROOT / "docker"
IGNORE = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ascend"])
def test_dockerfiles(name):
    text = (DOCKER / name).read_text(encoding="utf-8")
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]]
    assert {"setup.py", "mindrlhf"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in IGNORE, source
    images = re.findall(r"^FROM (\S+)", text, re.M)
    assert images and all(re.fullmatch(r"[\w/]+:[\w.${}-]+", image) for image in images)  # a tag, and no host


@pytest.fixture()
def run_ascend(tmp_path):
    """A function: arguments, environment -> docker/run_ascend.sh, with a docker that prints what it is given."""
    docker = tmp_path / "docker"
    docker.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    docker.chmod(0o755)

    def run(*arguments, **variables):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        command = [str(DOCKER / "run_ascend.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)

    return run


def test_what_the_container_is_given(run_ascend, tmp_path):
    done = run_ascend("0,3", "mindrlhf:ascend", "mindrlhf", "grpo", "output=my runs", DRY_RUN="1", SHM_SIZE="4g")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["docker", "run"] and words[-4:] == ["mindrlhf:ascend", "mindrlhf", "grpo", "output=my runs"]
    given = [f"{name} {value}" for name, value in zip(words, words[1:], strict=False) if name.startswith("--")]
    devices = ("davinci0", "davinci3", "davinci_manager", "devmm_svm", "hisi_hdc")
    assert [f"--device /dev/{device}" for device in devices] == [one for one in given if one.startswith("--device")]
    assert "--volume /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro" in given
    assert f"--volume {tmp_path}/runs:/workspace/runs" in given and "--shm-size 4g" in given
    documented = (DOCKER / "Dockerfile.ascend").read_text(encoding="utf-8")
    for one in given:
        path = one.split()[1].split(":")[0]
        if path.startswith(("/dev/", "/usr/", "/etc/")) and "davinci" not in path:
            assert path in documented, path


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (("0", "mindrlhf:ascend"), {}, "usage: "),
        (("0;1", "mindrlhf:ascend", "mindrlhf"), {}, "devices '0;1': must be numbers with commas, such as 0,1,2,3"),
        (("all", "mindrlhf:ascend", "mindrlhf"), {}, "devices 'all': must be numbers with commas"),
        (("0", "mindrlhf:ascend", "mindrlhf"), {"SHM_SIZE": "much"}, "SHM_SIZE=much: must be a size, such as 16g"),
        (("99", "mindrlhf:ascend", "mindrlhf"), {}, "/dev/davinci99: not on this host"),
    ],
)
def test_bad_arguments(run_ascend, arguments, variables, message):
    done = run_ascend(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"run_ascend.sh: {message}" in done.stderr and done.stderr.count("\n") == 1
