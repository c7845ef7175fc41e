"""mindrlhf/utils/parallel.py: the environment, and what is refused before MindSpore starts."""

import os
import subprocess
import sys

import pytest

from mindrlhf.errors import UserError
from mindrlhf.utils import parallel

NAMES = (
    "OMP_NUM_THREADS", "GLOG_v", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "LOG_MF_PATH",
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
)  # fmt: skip


def test_prepare_environment_keeps_what_is_set(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOG_v", "1")
    parallel.prepare_environment()
    assert os.environ["GLOG_v"] == "1"  # noqa: SIM112 - the name that MindSpore reads
    assert os.environ["OMP_NUM_THREADS"] == str(parallel.usable_cores())
    assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "1"
    assert "mindformers-log" in os.environ["LOG_MF_PATH"]


def test_usable_cores():
    assert 1 <= parallel.usable_cores() <= os.cpu_count()


def test_processes_without_a_meeting_place():
    program = "from mindrlhf.utils.parallel import start\nstart()\n"
    _, _, error = run_alone(program, RANK_SIZE="2", RANK_ID="1")
    assert "RANK_SIZE=2: the processes have nowhere to meet; start them with msrun" in error
    _, _, error = run_alone(program, RANK_SIZE="two")
    assert "RANK_ID=0, RANK_SIZE=two: not the numbers of a process" in error


def test_device(monkeypatch):
    monkeypatch.delenv(parallel.DEVICE_VARIABLE, raising=False)
    assert parallel.device_target() == "CPU"
    monkeypatch.setenv(parallel.DEVICE_VARIABLE, "ascend")
    assert parallel.device_target() == "Ascend"
    monkeypatch.setenv(parallel.DEVICE_VARIABLE, "GPU")
    with pytest.raises(UserError, match="MINDRLHF_DEVICE=GPU: no such device; set it to one of CPU, Ascend"):
        parallel.device_target()


def test_bad_threads():
    with pytest.raises(UserError, match="threads: 0 is not 1 or more"):
        parallel.start(threads=0)


def run_alone(program, **variables):
    """(exit code, stdout, stderr) of a new process, without what `prepare_environment` has set in this one."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_start_twice_is_silent():
    program = (
        "from mindrlhf.utils.parallel import start\n"
        "assert start(threads=1, seed=3) == start() == 'CPU'\n"
        "import mindspore\n"
        "assert mindspore.get_context('mode') == mindspore.GRAPH_MODE\n"
        "assert mindspore.get_context('device_target') == 'CPU'\n"
        "assert mindspore.get_seed() == 3\n"
    )
    assert run_alone(program) == (0, "", "")


def test_mindspore_after_tensorboard():
    """Without what prepare_environment sets: "Descriptors cannot be created directly"."""
    program = (
        "from mindrlhf.utils.parallel import prepare_environment\n"
        "prepare_environment()\n"
        "from tensorboardX.proto.event_pb2 import Event\n"
        "import mindspore\n"
    )
    assert run_alone(program) == (0, "", "")


def test_start_in_a_program_that_has_used_mindspore():
    program = (
        "from mindrlhf.utils.parallel import start\n"
        "import mindspore\n"
        "(mindspore.Tensor([1.0]) + 1).asnumpy()\n"
        "assert start() == 'CPU'\n"
    )
    code, _, errors = run_alone(program, GLOG_v="3")
    assert (code, errors) == (0, "")


def test_a_device_that_is_not_there():
    program = (
        "from mindrlhf.errors import UserError\n"
        "from mindrlhf.utils.parallel import start\n"
        "try: print(start())\n"
        "except UserError as error: print(error)\n"
    )
    code, output, _ = run_alone(program, MINDRLHF_DEVICE="Ascend")
    assert code == 0
    assert output.startswith("MINDRLHF_DEVICE=Ascend: Unsupported device target Ascend") or output == "Ascend\n"
