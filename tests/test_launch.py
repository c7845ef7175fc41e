"""mindrlhf/launch.py: what workers are given, and how it ends when one of them does. The scripts for msrun."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindrlhf.utils.parallel import usable_cores
from tests.processes import ROOT, free_port

# Two seconds of grace instead of ten.
LAUNCH = "import sys; from mindrlhf import launch; launch.GRACE_SECONDS = 2; sys.exit(launch.main())"
# Every worker leaves its pid, and waits to be ended unless its rank has something else to do.
PREAMBLE = """
import contextlib, os, signal, sys, time
from pathlib import Path
rank, here = int(os.environ["RANK_ID"]), Path(__file__).parent
(here / f"pid_{rank}").write_text(str(os.getpid()))
print("rank", rank, "began", flush=True)
def wait_for(*ranks):
    while not all((here / f"pid_{other}").exists() for other in ranks): time.sleep(0.01)
def wait_for_the_end_of(other):
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(int((here / f"pid_{other}").read_text()), 0)
            time.sleep(0.01)
"""
WAIT = "\ntime.sleep(100)\n"


@pytest.fixture()
def job(tmp_path):
    """A function: program of a worker, workers, options -> the started launcher, which the test's end ends."""
    started = []

    def start(program, workers=2, *options, **variables):
        script = tmp_path / "job.py"
        script.write_text(PREAMBLE + program, encoding="utf-8")
        command = [sys.executable, "-c", LAUNCH, "--workers", str(workers), "--log-dir", str(tmp_path / "logs")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        started.append(
            subprocess.Popen(
                [*command, *options, "--", str(script)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield start
    for launcher in started:
        launcher.kill()
        launcher.communicate()


def finish(launcher, seconds=60):
    """Exit code, standard output, standard error."""
    output, error = launcher.communicate(timeout=seconds)
    return launcher.returncode, output, error


def pids(directory, count):
    """Of the workers, once all have begun."""
    files = [directory / f"pid_{rank}" for rank in range(count)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # one that has ended and that its new parent has not asked for yet


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def test_workers_get_their_place(job, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program = "print(*(os.environ[name] for name in ('RANK_SIZE', 'MINDRLHF_STORE', 'OMP_NUM_THREADS')))"
    code, output, error = finish(job(program, 2))
    assert (code, error) == (0, "")
    logs = [(tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines() for rank in range(2)]
    assert output.splitlines() == logs[0]
    assert [log[0] for log in logs] == ["rank 0 began", "rank 1 began"]
    size, store, threads = logs[0][1].split()
    assert logs[1][1] == logs[0][1]
    assert size == "2" and store.startswith("127.0.0.1:")
    assert threads == str(max(1, usable_cores() // 2))
    code, output, _ = finish(job(program, 2, OMP_NUM_THREADS="7"))
    assert output.split()[-1] == "7"


def test_several_nodes(job, tmp_path):
    """Two launchers: the ranks of the second follow, and all meet where they were told."""
    program = "wait_for(0, 1, 2, 3)\nprint(os.environ['RANK_SIZE'], os.environ['MINDRLHF_STORE'])"
    master = f"127.0.0.1:{free_port()}"
    options = ("--nodes", "2", "--master", master, "--node-rank")
    nodes = [job(program, 2, *options, "0"), job(program, 2, *options, "1")]
    ended = [finish(node) for node in nodes]
    assert ended == [(0, f"rank 0 began\n4 {master}\n", ""), (0, "", "")]
    assert (tmp_path / "logs" / "rank_3.log").read_text() == f"rank 3 began\n4 {master}\n"


def test_output_is_shown_while_it_runs(job):
    launcher = job(WAIT, 1)
    assert launcher.stdout.readline() == "rank 0 began\n"
    assert launcher.poll() is None


def test_a_killed_worker(job, tmp_path):
    """The others are ended, one that does not listen too; a process that is no worker is not."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    program = (
        "if rank == 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if rank == 1: wait_for(0, 2); print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)" + WAIT
    )
    try:
        code, output, error = finish(job(program, 3))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert code == 128 + signal.SIGKILL
    log = tmp_path / "logs" / "rank_1.log"
    assert error.splitlines() == [
        "mindrlhf.launch: rank 1 was killed by SIGKILL; ending the others",
        f"mindrlhf.launch: rank 1 was killed by SIGKILL; the end of {log}:", "  rank 1 began", "  last words",
    ]  # fmt: skip
    assert output == "rank 0 began\n"
    assert not any(map(is_running, pids(tmp_path, 3)))


def test_the_first_cause_is_named(job):
    """Rank 0 ends first, but with what a collective says when its peer is gone."""
    program = (
        "wait_for(0, 1)\n"
        "if rank == 0: raise RuntimeError('AllGather failed.')\n"
        "wait_for_the_end_of(0)\nraise ValueError('broken')\n"
    )
    code, output, error = finish(job(program))
    assert code == 1
    assert "mindrlhf.launch: rank 1 failed with exit code 1; the end of" in error
    assert error.endswith("  ValueError: broken\n") and "AllGather" not in error
    assert "AllGather" in output  # rank 0's, shown as always


def test_the_first_of_equals_is_named(job):
    program = (
        "wait_for(0, 1, 2)\nif rank == 0: time.sleep(100)\nif rank == 2: wait_for_the_end_of(1)\nsys.exit(4 + rank)"
    )
    code, _, error = finish(job(program, 3))
    assert code == 5 and error.startswith("mindrlhf.launch: rank 1 failed with exit code 5")


def test_a_users_mistake_is_shown_once(job):
    mistake = "print('mindrlhf: error: data.train: no file is named', file=sys.stderr)\nsys.exit(2)"
    code, output, error = finish(job("wait_for(0, 1)\n" + mistake))
    assert (code, error) == (2, "")
    assert output == "rank 0 began\nmindrlhf: error: data.train: no file is named\n"


def test_a_mistake_of_one_worker_is_its_own(job):
    program = "if rank == 1: print('mindrlhf: error: no such model', file=sys.stderr); sys.exit(2)" + WAIT
    code, _, error = finish(job(program))
    assert code == 2
    assert error.startswith("mindrlhf.launch: rank 1 failed with exit code 2; the end of")
    assert error.endswith("  mindrlhf: error: no such model\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_is_told_to_stop(job, tmp_path, number):
    """Workers get SIGTERM, and their time to finish."""
    program = (
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(130)))\n"
        "(here / f'ready_{rank}').touch()" + WAIT
    )
    launcher = job(program)
    workers = pids(tmp_path, 2)
    wait_until(lambda: all((tmp_path / f"ready_{rank}").exists() for rank in range(2)))
    launcher.send_signal(number)
    code, output, error = finish(launcher)
    assert (code, error) == (128 + number, f"mindrlhf.launch: stopped by {number.name}\n")
    assert output == "rank 0 began\nsaved\n"
    assert not any(map(is_running, workers))


def test_workers_do_not_outlive_the_launcher(job, tmp_path):
    launcher = job(WAIT)
    workers = pids(tmp_path, 2)
    launcher.kill()
    wait_until(lambda: not any(map(is_running, workers)))


def test_nobody_reads_the_output(job, tmp_path):
    launcher = job("while True: print('more', flush=True); time.sleep(0.01)")
    workers = pids(tmp_path, 2)
    launcher.stdout.close()
    assert launcher.wait(timeout=60) == 128 + signal.SIGPIPE
    assert not any(map(is_running, workers))


def test_a_worker_that_dies_while_another_is_in_a_collective(job, tmp_path):
    """Processes that have met: the one in the collective is deaf to SIGTERM, for it is not in Python."""
    program = (
        "from mindrlhf.utils import parallel\n"
        "parallel.start()\n"
        "print(parallel.gather_objects(rank), flush=True)\n"
        "if rank == 1: time.sleep(1); os.kill(os.getpid(), signal.SIGSEGV)\n"
        "parallel.gather_objects(None)\n"
    )
    code, output, error = finish(job(program, 2, OMP_NUM_THREADS="1"), 120)
    assert code == 128 + signal.SIGSEGV
    assert error.startswith("mindrlhf.launch: rank 1 was killed by SIGSEGV") and "\n  [0, 1]\n" in error
    assert "[0, 1]\n" in output
    assert not any(map(is_running, pids(tmp_path, 2)))


def launch(*arguments):
    command = [sys.executable, "-m", "mindrlhf.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "the following arguments are required: --workers; see --help"),
        ("--workers 2", "nothing to run; put it at the end, as in --workers 2 -- grpo --config x.yaml"),
        ("--workers 0 -- sft", "--workers 0: must be 1 or more"),
        ("--workers two -- sft", "argument --workers: invalid int value: 'two'; see --help"),
        ("--workers 2 -- none.py", "none.py: no such file"),
        ("--workers 2 --nodes 2 -- sft", "--master: missing; with several nodes it is HOST:PORT of node 0"),
        ("--workers 2 --master here -- sft", "--master here: must be HOST:PORT, as in 10.0.0.1:9190"),
        ("--workers 2 --node-rank 1 -- sft", "--node-rank 1: must be 0 to 0, as --nodes is 1"),
        ("--workers 2 --log-dir setup.py -- sft", "--log-dir setup.py: File exists; name a directory to write to"),
    ],
)
def test_bad_arguments(arguments, message):
    done = launch(*arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mindrlhf.launch: error: {message}") and done.stderr.count("\n") == 1


def test_a_command_of_mindrlhf(tmp_path):
    done = launch("--workers", "2", "--log-dir", str(tmp_path), "--", "no-such-command")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("mindrlhf: error: unknown command 'no-such-command'") and done.stdout.count("\n") == 1
    assert launch("--help").stdout.startswith("usage: python -m mindrlhf.launch")


def test_an_ascend_worker_sees_one_device(job, tmp_path):
    """Its variables; no device is opened."""
    program = "print(os.environ['ASCEND_RT_VISIBLE_DEVICES'], os.environ['DEVICE_ID'])"
    variables = {"MINDRLHF_DEVICE": "Ascend", "ASCEND_RT_VISIBLE_DEVICES": "4,6"}
    assert finish(job(program, 2, **variables))[0] == 0
    devices = [(tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()[1] for rank in range(2)]
    assert devices == ["4 0", "6 0"]
    code, _, error = finish(job(program, 3, **variables))
    assert code == 2
    assert error == "mindrlhf.launch: error: --workers: more than the 2 devices of ASCEND_RT_VISIBLE_DEVICES=4,6\n"


@pytest.fixture()
def run_script(tmp_path):
    """A function: example, arguments, environment -> its run.sh, with a msrun that prints what it is given."""
    msrun = tmp_path / "msrun"
    msrun.write_text('#!/usr/bin/env bash\necho "$OMP_NUM_THREADS $PYTHONPATH"\nprintf "%s\\n" "$@"\n')
    msrun.chmod(0o755)

    def run(example, *arguments, **variables):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        command = [str(ROOT / "examples" / example / "run.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, cwd=tmp_path)

    return run


@pytest.mark.parametrize("example", ["grpo", "ppo", "dpo", "sft"])
def test_run_scripts(run_script, example):
    done = run_script(example, "a config.yaml", "output=my runs", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    first, *options = done.stdout.splitlines()
    assert first == f"3 {ROOT}"
    assert {"--worker_num=1", "--local_worker_num=1", "--master_addr=127.0.0.1"} <= set(options)
    command = ["python", "-m", "mindrlhf", example, "--config", "a config.yaml", "output=my runs"]
    assert options[-len(command) :] == command


def test_run_script_on_several_nodes(run_script):
    node = dict(WORKERS="4", NODES="2", NODE_RANK="1", PORT="9999", LOG_DIR="here")
    done = run_script("grpo", "x.yaml", **node, MASTER_ADDR="10.0.0.1")
    expected = (
        "--worker_num=8 --local_worker_num=4 --node_rank=1 --master_addr=10.0.0.1 --master_port=9999 --log_dir=here"
    )
    assert set(expected.split()) <= set(done.stdout.splitlines())
    done = run_script("grpo", "x.yaml", **node)
    assert done.returncode == 2 and done.stderr.startswith("NODES=2: set MASTER_ADDR to the address of node 0")


def test_run_script_says_its_usage(run_script):
    for arguments in ((), ("--help",)):
        done = run_script("grpo", *arguments)
        assert done.returncode == 2 and done.stderr.startswith("usage: [WORKERS=1]")
