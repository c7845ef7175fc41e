"""The only file that touches MindSpore's context or environment variables: device, threads, processes.

Order matters. `import mindspore` loads libgomp, which reads OMP_NUM_THREADS once, and where the variable is missing it
sets it to half the cores for whatever OpenMP is loaded later. GLOG_v is read at import too. So `prepare_environment`
has to run before the first `import mindspore`; `start` may come at any time before the first compiled cell.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from mindrlhf.errors import UserError

DEVICE_VARIABLE = "MINDRLHF_DEVICE"
DEVICES = ("CPU", "Ascend")
_started: list[str] = []  # the device, once `start` has run


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
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",  # else: "PyTorch was not found" at import
        # MindSpore needs it and sets it at import, too late where tensorboardX has loaded protobuf before:
        # "Descriptors cannot be created directly".
        "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
        # MindFormers writes ./output/log at import; one folder a user, so that runs leave nothing to clean up.
        "LOG_MF_PATH": os.path.join(tempfile.gettempdir(), f"mindrlhf-{user}", "mindformers-log"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def device_target() -> str:
    """The device that MINDRLHF_DEVICE asks for. Raises UserError for one that does not exist."""
    asked = os.environ.get(DEVICE_VARIABLE) or "CPU"
    for device in DEVICES:
        if asked.lower() == device.lower():
            return device
    raise UserError(f"{DEVICE_VARIABLE}={asked}: no such device; set it to one of {', '.join(DEVICES)}")


def start(threads: int | None = None, seed: int | None = None) -> str:
    """Graph mode, device and threads; the second and later calls only seed again.

    threads: of the element-wise CPU kernels, default the usable cores; matrix products always use every core.
    seed: of MindSpore's own and NumPy's global generators; None leaves them alone.
    Returns the device. Raises UserError for several processes, an unknown device, and one that is not there.
    """
    _refuse_several_processes()
    _leave_if_scheduler()
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
                mindspore.device_context.cpu.op_tuning.threads_num(threads or usable_cores())
        _started.append(device)
    if seed is not None:
        mindspore.set_seed(seed)
    return _started[0]


def _refuse_several_processes() -> None:
    for name in ("RANK_SIZE", "MS_WORKER_NUM"):
        count = os.environ.get(name) or "1"
        if count != "1":
            raise UserError(f"{name}={count}: several processes are not supported yet; unset it and start one process")


def _leave_if_scheduler() -> None:
    """msrun starts the script once more than there are workers, as their scheduler; one worker needs none.

    Without this line it would train too, beside the worker and into the same directory.
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        raise SystemExit(0)
