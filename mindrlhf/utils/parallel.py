"""The only file that touches MindSpore's context, groups or environment variables: device, threads, processes.

Order matters. `import mindspore` loads libgomp, which reads OMP_NUM_THREADS once, and where the variable is missing it
sets it to half the cores for whatever OpenMP is loaded later. GLOG_v is read at import too. So `prepare_environment`
has to run before the first `import mindspore`; `start` may come at any time before the first compiled cell.
"""

import contextlib
import datetime
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.errors import CommonError, UserError

DEVICE_VARIABLE = "MINDRLHF_DEVICE"
DEVICES = ("CPU", "Ascend")
_started: list[str] = []  # the device, once `start` has run
_world: list["World"] = []  # and this process among the others
_groups: set[str] = set()  # names of the groups of processes that MindSpore knows
_kept: list[Any] = []  # what must live as long as the process


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's CPU quota where that is smaller."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def prepare_environment() -> None:
    """Environment variables for MindSpore and its company; what the user has set stays. Imports nothing heavy."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    defaults = {
        "OMP_NUM_THREADS": str(usable_cores()),
        "GLOG_v": "3",  # MindSpore logs errors, not warnings
        "MS_NODE_TIMEOUT": "300",  # seconds that a collective waits for a process that is busy elsewhere; else 30
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # else: "PyTorch was not found" at import
        # MindSpore needs it and sets it at import, too late where tensorboardX has loaded protobuf before:
        # "Descriptors cannot be created directly".
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
        # MindFormers writes ./output/log at import; one folder a user, so that runs leave nothing to clean up.
        "LOG_MF_PATH": os.path.join(tempfile.gettempdir(), f"mindrlhf-{user}", "mindformers-log"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # MindSpore's own switch loads graphs by their number, whatever they compute: see utils/compile_cache.py.
    os.environ.pop("MS_COMPILER_CACHE_ENABLE", None)


def device_target() -> str:
    """The device that MINDRLHF_DEVICE asks for. Raises UserError for one that does not exist."""
    asked = os.environ.get(DEVICE_VARIABLE) or "CPU"
    for device in DEVICES:
        if asked.lower() == device.lower():
            return device
    raise UserError(f"{DEVICE_VARIABLE}={asked}: no such device; set it to one of {', '.join(DEVICES)}")


def start(threads: int | None = None, seed: int | None = None) -> str:
    """Graph mode, device and threads; the second and later calls only seed again.

    threads: of the element-wise CPU kernels, default OMP_NUM_THREADS, and that is the usable cores where it is not set.
    seed: of MindSpore's own and NumPy's global generators; None leaves them alone.
    Returns the device. Raises UserError for an unknown device, and for one that is not there.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads: {threads} is not 1 or more")
    prepare_environment()
    import mindspore

    if not _started:
        device = device_target()
        mindspore.set_context(mode=mindspore.GRAPH_MODE)
        # MindSpore refuses set_device once anything has run, even the device that it runs on.
        if mindspore.get_context("device_target") != device:
            try:
                mindspore.set_device(device)
            except RuntimeError as error:
                reason = str(error).split(". ")[0]
                raise UserError(f"{DEVICE_VARIABLE}={device}: {reason}; unset it to use the CPU") from error
        if device == "CPU":
            # It can be set once a process, before anything has run: what a user's program has chosen stays.
            with contextlib.suppress(RuntimeError):
                mindspore.device_context.cpu.op_tuning.threads_num(threads or _threads())
        _join(device)
        _started.append(device)
    if seed is not None:
        mindspore.set_seed(seed)
    return _started[0]


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) else usable_cores()


def set_compile_cache(directory: Path, program: Path) -> None:
    """Where compiled graphs lie; it cannot be changed once a graph has been kept there. program: a Python file that
    they depend on, with its imports, instead of sys.argv[0], which need not exist."""
    import mindspore
    from mindspore.graph import api

    mindspore.set_context(compile_cache_path=str(directory))
    api.entry_script_path = str(program)


@contextlib.contextmanager
def compile_with_cache() -> Iterator[None]:
    """Inside, MindSpore loads the graph of its next number or keeps the one it compiles. See utils/compile_cache.py."""
    import mindspore

    mindspore.set_context(enable_compile_cache=True)
    try:
        yield
    finally:
        mindspore.set_context(enable_compile_cache=False)


# -- several processes ------------------------------------------------------------------------------------------------

STORE_VARIABLE = "MINDRLHF_STORE"  # host:port where the processes of `python -m mindrlhf.launch` meet
JOIN_SECONDS = 300  # that a process waits for the others


class World(NamedTuple):
    """This process among those of the job."""

    rank: int = 0
    size: int = 1


def world() -> World:
    """As `start` has found it; before that, as the environment says it will be."""
    return _world[0] if _world else _asked()


def is_main() -> bool:
    """Whether this is the process that writes the job's files."""
    return world().rank == 0


def _asked() -> World:
    """By our launcher (RANK_ID, RANK_SIZE) or by msrun (MS_NODE_ID, MS_WORKER_NUM)."""
    size = os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM") or "1"
    rank = os.environ.get("RANK_ID") or os.environ.get("MS_NODE_ID") or "0"
    if not (size.isdigit() and rank.isdigit() and int(size) > 0):
        raise UserError(f"RANK_ID={rank}, RANK_SIZE={size}: not the numbers of a process and of all processes")
    return World(int(rank), int(size))


def _join(device: str) -> None:
    """Meet the other processes, if there are any; called once the device is set."""
    asked = _asked()
    store = os.environ.get(STORE_VARIABLE)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        if asked.size > 1:  # msrun starts the script once more than there are workers: this one is their scheduler
            from mindspore.communication import init

            init()  # serves the workers, and returns when they are done
        raise SystemExit(0)
    if asked.size > 1 and store:
        from mindspore.communication.management import _init_with_store
        from mindspore.mint.distributed import TCPStore

        host, _, port = store.rpartition(":")
        meeting = TCPStore(host, int(port), asked.size, asked.rank == 0)
        backend = "mccl" if device == "CPU" else "hccl"
        wait = datetime.timedelta(seconds=JOIN_SECONDS)
        _init_with_store(backend=backend, store=meeting, rank=asked.rank, world_size=asked.size, timeout=wait)
        _kept.append(meeting)
    elif asked.size > 1 and os.environ.get("MS_WORKER_NUM"):
        from mindspore.communication import get_rank, init

        init()
        asked = World(get_rank(), asked.size)
    elif asked.size > 1:
        raise UserError(
            f"RANK_SIZE={asked.size}: the processes have nowhere to meet; start them with msrun or with "
            "`python -m mindrlhf.launch`, or unset it"
        )
    _world.append(asked)


def group_name(ranks: Sequence[int]) -> str:
    """MindSpore's name of a group of ranks, made where it is new; only its members may ask, in the same order."""
    ranks = list(ranks)
    assert world().rank in ranks, (world(), ranks)
    name = "group-" + "-".join(map(str, ranks)) if len(ranks) < 64 else f"group-{hash(tuple(ranks)) & (2**63 - 1)}"
    if name not in _groups:
        from mindspore.communication import create_group

        create_group(name, ranks)
        _groups.add(name)
    return name


def gather_objects(value: Any, ranks: Sequence[int] | None = None) -> list[Any]:
    """Every rank's picklable value, by rank; ranks: of those only, default all. All of them must call this."""
    ranks = range(world().size) if ranks is None else ranks
    if len(ranks) == 1:
        return [value]
    from mindspore.mint.distributed import all_gather_object

    found = [None] * len(ranks)
    all_gather_object(found, value, group=group_name(ranks))
    return found


def from_main(run: Callable[[], Any]) -> Any:
    """What `run` returns in the main process, in all of them. A UserError there is a CommonError in all."""
    if world().size == 1:
        return run()
    answer = error = None
    if is_main():
        try:
            answer = run()
        except UserError as found:
            error = str(found)
    answer, error = gather_objects((answer, error))[0]
    if error is not None:
        raise CommonError(error)
    return answer


def agree(what: str, value: str) -> None:
    """Raises UserError in every process where they do not all have the same text."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            ours, theirs = _first_difference(values[0], other)
            raise CommonError(
                f"{what}: process {rank} has {theirs}, process 0 has {ours}; start all of them with the same"
            )


def _first_difference(ours: str, theirs: str) -> tuple[str, str]:
    for one, other in zip_longest(ours.splitlines(), theirs.splitlines(), fillvalue="nothing"):
        if one != other:
            return repr(one.strip()), repr(other.strip())
    raise AssertionError("they are the same")
