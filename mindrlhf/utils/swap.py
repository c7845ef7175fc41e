"""Which models are in memory in which phase of a step: what a phase does not need leaves, and comes back in time.

Gradients, the generator's weights and its cache are written anew whenever they are used, so they are simply given
back. With `memory.swap` the others leave too: on a CPU their pages are written to a file and dropped, on Ascend they go
to the host (Parameter._offload and _load, not verified). The parameters stay what they are, so nothing compiles anew.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Parameter

from mindrlhf.config import MemoryConfig
from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import Background
from mindrlhf.utils.memory import GB, drop, pages
from mindrlhf.utils.memory_timeline import Timeline, write_timeline
from mindrlhf.utils.parallel import device_target

ROLES = (
    "policy", "policy_optimizer", "policy_gradients", "average", "critic", "critic_optimizer", "critic_gradients",
    "reference", "reward_model", "generator", "kv_cache",
)  # fmt: skip


class Memory:
    """Roles by name, and the phases that need them.

    As a phase begins, what it does not need leaves, and then its own roles come in. Nothing moves when it ends: what
    the last phase needed is there until the next one begins, and anything else must not be touched outside of a phase.
    """

    def __init__(self, config: MemoryConfig):
        """Raises UserError for a directory that is not there."""
        self.config = config
        self.directory = config.directory or tempfile.gettempdir()
        if config.swap and not os.path.isdir(self.directory):
            raise UserError(f"memory.directory: {self.directory}: no such directory; make it, or name another")
        self._roles: dict[str, _Role] = {}
        self._open: list[tuple[str, ...]] = []  # roles of the phases that are inside one another now
        self._phase = ""  # the outermost one that began last
        self._following: dict[str, tuple[str, ...]] = {}  # by phase, the roles of the one that came behind it
        self._largest = 0  # bytes of the roles of the largest phase so far
        self._prefetch: Background | None = None
        self._step: Timeline | None = None  # of the step that runs
        self._last: Timeline | None = None  # of the last one that is done

    def add(
        self,
        name: str,
        parameters: Sequence[Parameter],
        release: Callable[[], None] | None = None,
        changing: Sequence[Parameter] | None = None,
    ) -> None:
        """A role, or what it is from now on. With swap it leaves at once.

        release: gives back memory whose values the next use writes anew. changing: those that are trained, default all;
        the others are written to the file once. Raises UserError where the disk has no room.
        """
        assert name in ROLES, name
        self._finish_prefetch()
        store = None
        if release:
            store = _Anew(parameters, release)
        elif self.config.swap:
            on_cpu = device_target() == "CPU"
            store = _File(name, parameters, changing, self.directory) if on_cpu else _Host(parameters)
        role = self._roles[name] = _Role(sum(map(_size, parameters)), store)
        if self.config.swap and not any(name in roles for roles in self._open):
            role.put_away()

    @contextmanager
    def phase(self, name: str, *roles: str) -> Iterator[None]:
        """Inside it those roles are in memory; one that was never added is no part of this job.

        A phase inside another one keeps what the outer one needs. Raises UserError where a file cannot be written or
        read; a role whose values could not be read stays away, so that nobody takes zeros for them.
        """
        assert set(roles) <= set(ROLES), roles
        self._open.append(roles)
        try:
            self._begin(name)
            yield
        finally:
            self._open.pop()

    def _begin(self, name: str) -> None:
        outermost = len(self._open) == 1
        if self._step and outermost:
            self._step.begin(name)
        start = time.perf_counter()
        self._finish_prefetch()
        needed = {role for roles in self._open for role in roles if role in self._roles}
        written = sum(role.put_away() for other, role in self._roles.items() if other not in needed)
        for role in sorted(needed, key=ROLES.index):
            self._roles[role].bring_in()
        size = sum(self._roles[role].size for role in needed)
        self._largest = max(self._largest, size)
        if self._step:
            self._step.moved(*self._bytes(), written, time.perf_counter() - start)
        if outermost:
            self._following[self._phase], self._phase = self._open[0], name
            self._start_prefetch(size)

    def _start_prefetch(self, size: int) -> None:
        """In a thread: what the phase that came behind this one the last time needs, where it fits beside this one's
        `size` without more bytes than the largest phase has; so the peak does not rise."""
        coming, step = [], self._step
        for name in self._following.get(self._phase, ()) if self.config.prefetch else ():
            role = self._roles.get(name)
            if role and not role.resident and role.store.keeps and size + role.size <= self._largest:
                size += role.size
                coming.append(role)

        def bring_in() -> None:
            for role in coming:
                role.bring_in()
                if step:
                    step.moved(*self._bytes())

        self._prefetch = Background(bring_in) if coming else None

    def _finish_prefetch(self) -> None:
        prefetch, self._prefetch = self._prefetch, None
        if prefetch:
            prefetch.result()

    def _bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """In memory, and kept elsewhere, by role."""
        roles = {name: self._roles[name] for name in ROLES if name in self._roles}
        kept = {name: role for name, role in roles.items() if not role.resident and role.store.keeps}
        return (
            {name: role.size - (0 if role.resident else role.store.size) for name, role in roles.items()},
            {name: role.store.size for name, role in kept.items()},
        )

    # -- accounting -------------------------------------------------------------------------------------------------

    def start_step(self) -> None:
        """Account for what happens from now on."""
        self._step = Timeline(*self._bytes())

    def finish_step(self) -> dict[str, float]:
        """Metrics of the step: the peak of the roles' own bytes and that of the process's memory, and with swap what
        was written and the seconds that training waited for it all."""
        self._last, self._step = self._step, None
        metrics = self._last.finish()
        moves = ("memory/spilled_gb", "seconds/memory")
        return {name: value for name, value in metrics.items() if self.config.swap or name not in moves}

    def write(self, directory: Path) -> None:
        """The last step as memory.json and memory.png: bytes by role, phase and device. Without a step, nothing."""
        if self._last:
            sizes = {name: self._roles[name].size for name in ROLES if name in self._roles}
            write_timeline(self._last, sizes, directory)


# -- where a role is while nobody needs it ----------------------------------------------------------------------------


class _Role:
    def __init__(self, size: int, store: "_Anew | _File | _Host | None"):
        """size: bytes. store: None where it always stays."""
        self.size, self.store = size, store
        self.resident = True

    def put_away(self) -> int:
        """Returns the bytes that had to be written."""
        if not self.resident or not self.store:
            return 0
        written = self.store.put_away()
        self.resident = False
        return written

    def bring_in(self) -> None:
        if not self.resident:
            self.store.bring_in()
            self.resident = True


class _Anew:
    """Nowhere: the next use writes the values."""

    keeps = False  # the values

    def __init__(self, parameters: Sequence[Parameter], release: Callable[[], None]):
        self.release = release
        self.size = sum(len(pages(parameter)) for parameter in parameters)  # bytes that can leave

    def put_away(self) -> int:
        self.release()
        return 0

    def bring_in(self) -> None:
        """Its pages come as they are written."""


class _File:
    """In a file without a name, which is gone with the process, however that ends.

    Written and read, not mapped: a full disk is an error then and not a signal, mapped pages would count as resident
    memory, and a copy between the parameter and the page cache runs at several GB/s.
    """

    keeps = True

    def __init__(
        self, role: str, parameters: Sequence[Parameter], changing: Sequence[Parameter] | None, directory: str
    ):
        self.role, self.directory = role, directory
        self.size = sum(len(pages(parameter)) for parameter in parameters)  # bytes that can leave
        trained = {id(parameter) for parameter in (parameters if changing is None else changing)}
        self._slots, size = [], 0
        for parameter in parameters:
            self._slots.append(_Slot(parameter, size, id(parameter) not in trained))
            size += _size(parameter)
        self._away: list[tuple[np.ndarray, int]] = []  # pages and their places in the file; made where graphs run
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - open as long as the role is there
            os.posix_fallocate(self._file.fileno(), 0, max(size, 1))  # no room: now, not in mid-training
        except OSError as error:
            raise self._problem(f"{size / GB:.1f} GB for", error) from error

    def put_away(self) -> int:
        """Nothing is dropped before all of it is written."""
        away, written = [(pages(slot.parameter), slot) for slot in self._slots], 0
        try:
            for memory, slot in away:
                address = memory.ctypes.data
                if not slot.frozen or slot.written_from != address:
                    _all(lambda view, offset: os.pwrite(self._file.fileno(), view, offset), memory, slot.offset)
                    slot.written_from = address
                    written += len(memory)
        except OSError as error:
            raise self._problem("writing", error) from error
        for memory, _ in away:
            drop(memory)
        self._away = [(memory, slot.offset) for memory, slot in away]
        return written

    def bring_in(self) -> None:
        try:
            for memory, offset in self._away:
                _all(lambda view, offset: os.preadv(self._file.fileno(), [view], offset), memory, offset)
        except OSError as error:
            raise self._problem("reading back", error) from error
        self._away = []  # it would hold memory that set_data replaces

    def _problem(self, doing: str, error: OSError) -> UserError:
        reason = error.strerror or str(error)
        return UserError(
            f"memory.directory: {self.directory}: {doing} {self.role}: {reason}; name a directory on a disk with room, "
            "or set memory.swap: false"
        )


@dataclass
class _Slot:
    parameter: Parameter
    offset: int  # of its room in the file
    frozen: bool
    written_from: int = 0  # address of the memory that the file holds


class _Host:
    """In the host's memory, by MindSpore's own means. Not verified: Tensor._offload and _load are Ascend's alone."""

    keeps = True

    def __init__(self, parameters: Sequence[Parameter]):
        self._parameters = parameters
        self.size = sum(map(_size, parameters))

    def put_away(self) -> int:
        for parameter in self._parameters:
            parameter._offload()
        return self.size

    def bring_in(self) -> None:
        for parameter in self._parameters:
            parameter._load()


def _size(parameter: Parameter) -> int:
    return parameter.size * parameter.itemsize


def _all(move: Callable[[np.ndarray, int], int], memory: np.ndarray, offset: int) -> None:
    """move: (bytes, place in the file) -> how many of them it moved. Linux moves at most 2 GiB a call."""
    done = 0
    while done < len(memory):
        moved = move(memory[done:], offset + done)
        if not moved:
            raise OSError(f"the file ends at {offset + done}")
        done += moved
