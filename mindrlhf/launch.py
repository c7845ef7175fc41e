"""Start the processes of one job on this machine, and end them together.

    python -m mindrlhf.launch --workers 4 -- grpo --config x.yaml a.b=c

runs `python -m mindrlhf grpo ...` four times, as ranks 0 to 3 that meet at a free port. A file that ends in .py takes
the place of the command: `-- my_job.py a b`.
"""

import argparse
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.utils.parallel import STORE_VARIABLE, device_target, usable_cores

POLL_SECONDS = 0.05  # between looks at the workers
SETTLE_SECONDS = 2.0  # in which others that fail too may show who was first; MindSpore needs one to leave
GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL
TAIL_LINES, TAIL_BYTES = 30, 1 << 14
CHATTER = re.compile(rb"^\[INFO\] .*\n", re.MULTILINE)  # MindSpore's own, of a process that leaves; no level hides it
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
EPILOG = """Each worker has RANK_ID, RANK_SIZE, MINDRLHF_STORE and, unless it is set, OMP_NUM_THREADS: its share of the
cores. What it prints is in logs/rank_N.log; what rank 0 prints is shown. When a worker fails the others are ended, and
the failing rank, how it ended and the end of its log are shown. Exit code: that worker's, 128 + N for signal N.

Several nodes: the same command on each, with its own --node-rank; docs/launch.md."""


class Settings(NamedTuple):
    """What the command line asked for."""

    workers: int  # on this node
    nodes: int
    node_rank: int
    store: str  # host:port where all ranks meet
    log_dir: Path
    command: list[str]  # of every worker


@dataclass
class Worker:
    """One started process."""

    rank: int
    process: subprocess.Popen
    log: Path

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def tail(self) -> list[str]:
        """The last lines that it printed."""
        with open(self.log, "rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return CHATTER.sub(b"", file.read()).decode("utf-8", "replace").rstrip().splitlines()[-TAIL_LINES:]

    def names_a_cause(self) -> bool:
        """False where it may have failed only because another did: a collective without its peer is a RuntimeError."""
        code = self.process.returncode
        return code < 0 or code == 2 or not re.search("^RuntimeError: ", "\n".join(self.tail()), re.MULTILINE)


class Launcher:
    """The workers of this node. `run` starts them and returns when all have ended."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.workers: list[Worker] = []
        self.ended: list[Worker] = []  # in that order
        self.signals: list[int] = []  # that told this process to stop
        self.shown = 0  # bytes of rank 0's log

    def run(self) -> int:
        """The exit code. Raises UserError where the log directory cannot be made."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: self.signals.append(received))
        try:
            self._start()
            self._watch(lambda: self._failed() or self.signals)
            failed = self._failed()
            if failed and failed[0].process.returncode > 0:  # one that was killed is the cause
                self._watch(lambda: self.signals, SETTLE_SECONDS)
                failed = self._failed()
            if failed and failed[0].process.returncode < 0:  # nobody has said anything yet, and the others take a while
                how = _how_it_ended(failed[0].process.returncode)
                print(f"mindrlhf.launch: rank {failed[0].rank} {how}; ending the others", file=sys.stderr, flush=True)
        finally:
            self._stop()
        if failed:
            return self._report(failed)
        if self.signals:
            print(f"mindrlhf.launch: stopped by {signal.Signals(self.signals[0]).name}", file=sys.stderr)
            return 128 + self.signals[0]
        return 0

    def _start(self) -> None:
        workers, nodes, node_rank, store, log_dir, command = self.settings
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            logs = [log_dir / f"rank_{node_rank * workers + number}.log" for number in range(workers)]
            files = [open(log, "wb") for log in logs]  # noqa: SIM115 - closed below, once the workers have them
        except OSError as error:
            raise UserError(f"--log-dir {log_dir}: {error.strerror}; name a directory to write to") from None
        shared = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, usable_cores() // workers)), **os.environ}
        for number, (log, file) in enumerate(zip(logs, files, strict=True)):
            rank = node_rank * workers + number
            own = {"RANK_ID": str(rank), "RANK_SIZE": str(nodes * workers), STORE_VARIABLE: store}
            with file:
                process = subprocess.Popen(
                    command,
                    env={**shared, **own, **_device_variables(number)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in a terminal goes to this process only, which ends them
                    preexec_fn=_die_with_this_process(),
                )
            self.workers.append(Worker(rank, process, log))

    def _failed(self) -> list[Worker]:
        return [worker for worker in self.ended if worker.process.returncode]

    def _watch(self, until: Callable[[], object], seconds: float = float("inf")) -> None:
        """Until that is true, the time is up or all have ended; shows what rank 0 prints."""
        end = time.monotonic() + seconds
        while True:
            self.ended += [worker for worker in self.workers if worker not in self.ended and worker.has_ended()]
            self._show()
            if len(self.ended) == len(self.workers) or until() or time.monotonic() > end:
                return
            time.sleep(POLL_SECONDS)

    def _show(self) -> None:
        first = self.workers[0]
        if first.rank != 0 or signal.SIGPIPE in self.signals:
            return
        with open(first.log, "rb") as file:
            file.seek(self.shown)
            text = file.read()
        if not first.has_ended():
            text = text[: text.rfind(b"\n") + 1]  # whole lines
        self.shown += len(text)
        try:
            sys.stdout.buffer.write(CHATTER.sub(b"", text))
            sys.stdout.flush()
        except BrokenPipeError:  # nobody reads any more, and Python's own flush at the end must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.signals.append(signal.SIGPIPE)

    def _stop(self) -> None:
        """SIGTERM, and SIGKILL when the grace is over or on a second Ctrl-C. To own workers that still run only."""
        asked = len(self.signals)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in self.workers:
                worker.process.send_signal(number)  # none to one that has ended
            if self.workers:
                self._watch(lambda: len(self.signals) > asked, GRACE_SECONDS)

    def _report(self, failed: list[Worker]) -> int:
        """Says who was first. failed: in the order of their ends."""
        cause = next((worker for worker in failed if worker.names_a_cause()), failed[0])
        code, tail = cause.process.returncode, cause.tail()
        first = self.workers[0]
        if code == 2 and first.rank == 0 and tail[-1:] == first.tail()[-1:]:
            return code  # the user's mistake, in one line, which rank 0 has shown
        said = f"the end of {cause.log}:" if tail else f"{cause.log} is empty"
        print(f"mindrlhf.launch: rank {cause.rank} {_how_it_ended(code)}; {said}", file=sys.stderr)
        if cause is not first or first.rank != 0:  # what rank 0 printed has been shown
            print("".join(f"  {line}\n" for line in tail), end="", file=sys.stderr)
        return 128 - code if code < 0 else code


def _how_it_ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _die_with_this_process() -> Callable[[], None] | None:
    """What a worker runs first, so that SIGKILL to this process ends it too; Linux only."""
    if sys.platform != "linux":
        return None
    launcher, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def arm() -> None:
        prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != launcher:  # it was gone before
            os._exit(1)

    return arm


def _device_variables(number: int) -> dict[str, str]:
    """On Ascend a worker sees one device, its own, as number 0: what MindSpore takes without msrun. Not verified."""
    if device_target() != "Ascend":
        return {}
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else None
    if devices and number >= len(devices):
        raise UserError(f"--workers: more than the {len(devices)} devices of ASCEND_RT_VISIBLE_DEVICES={visible}")
    return {"ASCEND_RT_VISIBLE_DEVICES": devices[number] if devices else str(number), "DEVICE_ID": "0"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def read_arguments(argv: Sequence[str]) -> Settings:
    """Raises UserError."""
    parser = _Parser(
        prog="python -m mindrlhf.launch",
        usage="%(prog)s --workers N [options] -- COMMAND ... | -- FILE.py ...",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, required=True, help="processes on this node")
    parser.add_argument("--log-dir", type=Path, default=Path("logs"), help="default: logs")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this one; 0 holds the store (default: 0)")
    parser.add_argument("--master", metavar="HOST:PORT", help="of node 0, a free port (one node: found)")
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    given, program = parser.parse_args(argv[:end]), argv[end + 1 :]
    if not program:
        raise UserError("nothing to run; put it at the end, as in --workers 2 -- grpo --config x.yaml")
    if program[0].endswith(".py"):
        if not Path(program[0]).is_file():
            raise UserError(f"{program[0]}: no such file")
    else:
        program = ["-m", "mindrlhf", *program]
    for name, value in (("workers", given.workers), ("nodes", given.nodes)):
        if value < 1:
            raise UserError(f"--{name} {value}: must be 1 or more")
    if not 0 <= given.node_rank < given.nodes:
        raise UserError(f"--node-rank {given.node_rank}: must be 0 to {given.nodes - 1}, as --nodes is {given.nodes}")
    if given.nodes > 1 and not given.master:
        raise UserError("--master: missing; with several nodes it is HOST:PORT of node 0, the same on all of them")
    store = given.master or f"127.0.0.1:{_free_port()}"
    host, _, port = store.rpartition(":")
    if not host or not (port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--master {store}: must be HOST:PORT, as in 10.0.0.1:9190")
    return Settings(given.workers, given.nodes, given.node_rank, store, given.log_dir, [sys.executable, *program])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when every worker's is, 2 a user's mistake, else that of the worker that failed first."""
    try:
        return Launcher(read_arguments(sys.argv[1:] if argv is None else argv)).run()
    except UserError as error:
        print(f"mindrlhf.launch: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # of --help
        sys.exit(main())
