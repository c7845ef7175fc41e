"""Several processes of one job for a test: started together, ended by their own pids when the time is up."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    """How a process ended."""

    code: int  # negative: the signal that ended it
    output: str  # standard output and error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(arguments: Sequence[str], count: int, logs: Path, **variables: str) -> list[subprocess.Popen]:
    """`python *arguments` as ranks 0 to count - 1 of one world; what they print is in logs/rank_N.log."""
    port, processes = free_port(), []
    for rank in range(count):
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK_ID": str(rank),
            "RANK_SIZE": str(count), "MINDRLHF_STORE": f"127.0.0.1:{port}", **variables,
        }  # fmt: skip
        with open(logs / f"rank_{rank}.log", "w", encoding="utf-8") as log:
            command = [sys.executable, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


def run_ranks(arguments: Sequence[str], count: int, timeout: float, **variables: str) -> list[Done]:
    """How each rank ended. The first that fails, and the time, end the others."""
    with tempfile.TemporaryDirectory() as directory:
        processes = start_ranks(arguments, count, Path(directory), **variables)
        until = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < until:
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.1)  # between looks at the processes
        finally:
            for process in processes:
                process.kill()
                process.wait()
        logs = [Path(directory, f"rank_{rank}.log").read_text(encoding="utf-8") for rank in range(count)]
    return [Done(process.returncode, log) for process, log in zip(processes, logs, strict=True)]
