"""Compiled graphs kept on disk, so that a second start of a job does not compile them again.

MindSpore can keep graphs, but it only counts them: the n-th graph of a process is loaded where an n-th one was kept,
whatever it computes. So every graph has a key here, a hash of all that it is made from, and the n-th is loaded only
where the n-th key in the directory's list is its own. Behind the first that is not, the list is written anew.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.utils.parallel import compile_with_cache, device_target, set_compile_cache, world

VARIABLE = "MINDRLHF_COMPILE_CACHE"  # a directory; 0: none
KEPT = 20  # jobs in it, those used last
PACKAGE = Path(__file__).parents[1]
_jobs: list[str] = []  # that of this process
_opened: dict[str, "CompileCache | None"] = {}  # and its cache, from its first graph on


def start(job: str) -> None:
    """Keep the graphs of this process. job: a text; the same means the same graphs in the same order, mostly.

    Nothing is kept where several processes share a model, where another process of the same job runs, or where
    MINDRLHF_COMPILE_CACHE is 0.
    """
    if os.environ.get(VARIABLE) != "0":
        _jobs[:] = [job]


def is_active() -> bool:
    return bool(_jobs)


def run(cell: Any, inputs: tuple, call: Callable[..., Any]) -> Any:
    """call(*inputs), the first call of an outermost cell with inputs of those shapes."""
    if not _opened:
        _opened[_jobs[0]] = _open(_jobs[0])
    (cache,) = _opened.values()
    return cache.run(cell, inputs, call) if cache else call(*inputs)


def graphs_loaded() -> tuple[int, int]:
    """Graphs that this process has loaded, and those together with the ones that it has kept."""
    caches = [cache for cache in _opened.values() if cache]
    return (caches[0].loaded, caches[0].count) if caches else (0, 0)


def _open(job: str) -> "CompileCache | None":
    if world().size > 1:
        return None
    asked = os.environ.get(VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # A directory of its own in any case: what is old in it is removed.
    root = Path(asked) / "mindrlhf-graphs" if asked else cache / "mindrlhf" / "graphs"
    name = hashlib.sha256(f"{_of_program()}\n{job}".encode()).hexdigest()[:16]
    try:
        return CompileCache(root / name)
    except OSError:  # another process holds the lock, or there is no place to write to
        return None


class CompileCache:
    """The graphs in a directory, which no other process may use meanwhile. It is off once reading or writing fails."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(directory)  # as long as the process
        os.pwrite(self._lock, b"# held by the process that uses this directory\n", 0)
        os.utime(directory)
        _remove_old(directory.parent)
        self.graphs, self.list = directory / "rank_0" / "graph_cache", directory / "keys"
        self.failed = directory / "failed"
        self.is_off = self.failed.exists()
        self.keys = self.list.read_text().split() if self.list.exists() else []
        self.count = 0  # graphs that this process has loaded or kept: MindSpore's own number of the next one
        self.loaded = 0
        set_compile_cache(directory, directory / "lock")  # always the same: the keys hold what graphs depend on

    def run(self, cell: Any, inputs: tuple, call: Callable[..., Any]) -> Any:
        if self.is_off:
            return call(*inputs)
        try:
            key = digest(cell, tuple(_shape(one) for one in inputs))
            is_known, written = self._prepare(key)
        except Unknown:
            return call(*inputs)  # compiled, and not kept
        except OSError:
            self.is_off = True
            return call(*inputs)
        before = len(cell.compile_cache)
        try:
            with compile_with_cache():
                out = call(*inputs)
        except BaseException as error:
            self.is_off = True  # MindSpore may have counted this graph, or not
            if not is_known or not isinstance(error, RuntimeError) or len(cell.compile_cache) > before:
                raise
            with contextlib.suppress(OSError):
                self.failed.touch()  # MindSpore cannot load what it has kept: this job goes on without
            return call(*inputs)
        if len(cell.compile_cache) > before:
            try:
                self._note(key, is_known, written)
            except OSError:
                self.is_off = True
        return out

    def _prepare(self, key: str) -> tuple[bool, int | None]:
        """(whether the next graph is that of the key, when it was written)."""
        is_known = self.keys[self.count : self.count + 1] == [key]
        if is_known:
            return True, self._file.stat().st_mtime_ns if self._file.exists() else None
        self._write(self.keys[: self.count])  # first what is listed, so that an interruption leaves no wrong pair
        for path in self.graphs.glob("*.mindir"):
            if int(path.stem.split("_")[-1]) >= self.count:
                path.unlink()
        return False, None

    def _note(self, key: str, is_known: bool, written: int | None) -> None:
        """Behind a graph that was loaded or kept."""
        self.loaded += written == self._file.stat().st_mtime_ns  # else MindSpore has compiled and kept it again
        self.count += 1
        if not is_known:
            self._write([*self.keys, key])

    @property
    def _file(self) -> Path:
        """Of the next graph."""
        return self.graphs / f"compile_cache_{self.count}.mindir"

    def _write(self, keys: list[str]) -> None:
        self.keys = keys
        temporary = self.list.with_suffix(".new")
        temporary.write_text("\n".join(keys))
        temporary.replace(self.list)


def _locked(directory: Path) -> int:
    """Raises OSError where another process holds it."""
    lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove_old(root: Path) -> None:
    """All but the jobs that were used last, and those that a process uses."""
    jobs = [path.parent for path in root.glob("*/lock")]
    for old in sorted(jobs, key=lambda path: path.stat().st_mtime)[:-KEPT]:
        with contextlib.suppress(OSError):
            lock = _locked(old)
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)


@functools.cache
def _of_program() -> str:
    """What every graph depends on: this package, MindSpore, the device and our kernels' library."""
    import mindspore

    from mindrlhf.models import cpu_kernels

    parts = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            parts.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    kernels = digest(cpu_kernels.PRIMITIVES) if cpu_kernels.PRIMITIVES else ""
    parts.update(f"{mindspore.__version__} {device_target()} {kernels}".encode())
    return parts.hexdigest()


class Unknown(Exception):
    """Something that may be a part of a graph, and of which the content is not known."""


def digest(*values: Any) -> str:
    """A hash of what a graph can see of cells, tensors and plain values. Raises Unknown.

    Of a parameter that is its name, shape and type; of other tensors the numbers too, which are constants of the graph.
    """
    hasher, seen = hashlib.sha256(), {}
    for value in values:
        _add(value, hasher, seen)
    return hasher.hexdigest()


def _shape(value: Any) -> Any:
    """An input as a graph is compiled for it."""
    return (tuple(value.shape), str(value.dtype)) if hasattr(value, "dtype") else value


_PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, Path, slice, type(Ellipsis))


def _add(value: Any, hasher: Any, seen: dict[int, Any]) -> None:
    import mindspore as ms
    from mindspore import Parameter, Tensor

    kind = type(value)
    hasher.update(f"<{kind.__module__}.{kind.__qualname__}".encode())
    if isinstance(value, _PLAIN) or kind.__module__ == "mindspore.common.dtype" or isinstance(value, ms.Type):
        hasher.update(repr(value).encode())
        return
    if id(value) in seen:
        hasher.update(str(seen[id(value)][0]).encode())
        return
    seen[id(value)] = len(seen), value  # the object too, so that no other one gets its id
    if isinstance(value, Parameter):
        hasher.update(repr((value.name, value.shape, str(value.dtype), value.requires_grad)).encode())
    elif isinstance(value, np.ndarray | np.generic | Tensor):
        array = value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.hasobject:
            raise Unknown(kind)
        hasher.update(repr((array.shape, str(array.dtype))).encode() + np.ascontiguousarray(array).tobytes())
    else:
        for part in _parts(value):
            _add(part, hasher, seen)
    hasher.update(b">")


def _parts(value: Any) -> list[Any]:
    """What a container, cell, function or object is made of."""
    from mindspore import nn
    from mindspore.ops import Primitive

    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if hasattr(value, "__func__"):  # a method
        return [value.__self__, value.__func__.__qualname__]
    if isinstance(value, type) or hasattr(value, "__code__"):
        _check_source(value.__module__)
        names = value.__code__.co_freevars if hasattr(value, "__code__") else ()
        closure = zip(names, getattr(value, "__closure__", None) or (), strict=True)
        inside = [cell.cell_contents for name, cell in closure if name != "hash_obj"]  # MindSpore's, a time of day
        defaults = [getattr(value, "__defaults__", None), getattr(value, "__kwdefaults__", None)]
        return [value.__module__, value.__qualname__, *inside, *defaults]
    _check_source(type(value).__module__)
    if isinstance(value, Primitive):
        return [value.name, sorted(value.attrs.items()), sorted(getattr(value, "init_attrs", {}).items())]
    if not hasattr(value, "__dict__"):
        raise Unknown(type(value))
    own = vars(value)
    if isinstance(value, nn.Cell):
        ignored = _of_every_cell()
        own = {name: part for name, part in own.items() if name not in ignored}
    return [part for item in sorted(own.items()) for part in item]


@functools.cache
def _of_every_cell() -> frozenset[str]:
    """Attributes in which MindSpore keeps how a cell is run, but for its flags, children and parameters."""
    from mindspore import nn

    return frozenset(vars(nn.Cell())) - {"_cells", "_params", "training", "_func_graph_flags"} | {
        "phase", "known_shapes", "compile_phase", "arguments_key", "current_phase", "construct",
    }  # fmt: skip


def _check_source(module: str) -> None:
    """Raises Unknown for code whose text is no part of the key: a user's own."""
    if module.split(".")[0] not in ("mindrlhf", "mindspore", "builtins", "types", "functools", "collections"):
        raise Unknown(module)
