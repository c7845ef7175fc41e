"""Roles leave and come back: real pages, the right values, and errors instead of zeros."""

import json
import mmap
import os

import numpy as np
import pytest

from mindrlhf.config import MemoryConfig
from mindrlhf.errors import UserError

PAGE = mmap.PAGESIZE


@pytest.fixture()
def smallest(monkeypatch):
    """Pages of parameters of any size leave."""
    from mindrlhf.utils import memory

    monkeypatch.setattr(memory, "SMALLEST", 0)


@pytest.fixture()
def make_memory(mindspore, smallest, tmp_path):
    def make(**options):
        from mindrlhf.utils.swap import Memory

        return Memory(MemoryConfig(**{"swap": True, "directory": str(tmp_path), **options}))

    return make


@pytest.fixture()
def parameters(mindspore):
    """A function: a name, counts of pages -> float32 parameters of about that size, their values 1, 2, 3..."""

    def make(name, *counts):
        arrays = (np.arange(1, count * PAGE // 4 + 1, dtype=np.float32) for count in counts)
        return [mindspore.Parameter(mindspore.Tensor(a), name=f"{name}.{i}") for i, a in enumerate(arrays)]

    return make


def inner(parameter):
    """Its values but those in the first and the last page, which its neighbours may share."""
    return parameter.asnumpy()[PAGE // 4 : -PAGE // 4]


def test_pages_are_what_a_parameter_has_alone(parameters, smallest):
    from mindrlhf.utils.memory import pages

    (parameter,) = parameters("p", 5)
    found = pages(parameter)
    assert found.ctypes.data % PAGE == 0 and len(found) in (4 * PAGE, 5 * PAGE)
    found[:] = 0  # no copy
    assert not inner(parameter).any()


def test_memory_falls_and_values_come_back(make_memory, parameters):
    from mindrlhf.utils.memory import peak_rss, reset_peak_rss

    memory, big = make_memory(), parameters("policy", 16384)  # 64 MB
    expected = big[0].asnumpy().copy()
    memory.add("policy", big)
    reset_peak_rss()
    away = peak_rss()
    with memory.phase("train", "policy"):
        assert peak_rss() - away > 15000 * PAGE
        np.testing.assert_array_equal(big[0].asnumpy(), expected)
        big[0].asnumpy()[:] *= 2
    with memory.phase("other"):
        assert not inner(big[0]).any()
    with memory.phase("train", "policy"):
        np.testing.assert_array_equal(big[0].asnumpy(), 2 * expected)


def test_only_what_changes_is_written_again(make_memory, parameters):
    memory, models = make_memory(), {name: parameters(name, 8) for name in ("policy", "reference")}
    memory.add("reference", models["reference"], changing=())
    memory.add("policy", models["policy"])
    memory.start_step()
    for _ in range(2):
        with memory.phase("both", "policy", "reference"):
            pass
        with memory.phase("neither"):
            pass
    spilled = memory.finish_step()["memory/spilled_gb"] * 1e9
    assert 2 * 7 * PAGE <= spilled <= 2 * 8 * PAGE  # twice the policy


def test_a_role_takes_new_storage_along(make_memory, parameters, mindspore):
    """set_data, as resuming does it, puts another array behind the parameter."""
    memory, (parameter,) = make_memory(), parameters("policy_optimizer", 8)
    memory.add("policy_optimizer", [parameter])
    with memory.phase("load", "policy_optimizer"):
        parameter.set_data(mindspore.Tensor(np.full(parameter.shape, 7, np.float32)))
    with memory.phase("other"):
        assert not inner(parameter).any()
    with memory.phase("train", "policy_optimizer"):
        assert (parameter.asnumpy() == 7).all()


def test_phases_inside_one_another(make_memory, parameters):
    memory, models = make_memory(), {name: parameters(name, 8) for name in ("policy", "critic")}
    for name, own in models.items():
        memory.add(name, own)
    with memory.phase("outer", "policy"):
        with memory.phase("inner", "critic"):
            assert inner(models["policy"][0]).all() and inner(models["critic"][0]).all()
        assert inner(models["policy"][0]).all()
    with memory.phase("alone", "critic"):
        assert not inner(models["policy"][0]).any()


def test_without_swap_only_what_is_written_anew_leaves(make_memory, parameters):
    from mindrlhf.utils.memory import give_back

    memory, models = make_memory(swap=False), {name: parameters(name, 8) for name in ("policy", "generator")}
    memory.add("policy", models["policy"])
    memory.add("generator", models["generator"], release=lambda: give_back(models["generator"]))
    with memory.phase("train", "policy"):
        assert inner(models["policy"][0]).all() and not inner(models["generator"][0]).any()
    with memory.phase("generate", "generator"):
        assert inner(models["policy"][0]).all()


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_next_phase_is_prefetched_where_it_fits(make_memory, parameters, prefetch):
    """The largest phase has two roles; one more beside a single one fits, one more beside both does not."""
    memory = make_memory(prefetch=prefetch)
    models = {name: parameters(name, 8) for name in ("policy", "critic", "reference")}
    for name, own in models.items():
        memory.add(name, own)

    def step():
        early = {}
        for name, roles in (("one", ["reference"]), ("two", ["policy", "critic"]), ("three", ["reference"])):
            with memory.phase(name, *roles):
                memory._finish_prefetch()
                early[name] = [role for role, own in models.items() if role not in roles and inner(own[0]).any()]
        return early

    assert step() == {"one": [], "two": [], "three": []}  # nothing is known yet
    assert step() == {"one": ["policy"] if prefetch else [], "two": [], "three": []}


def test_the_accounting_of_a_step(make_memory, parameters, tmp_path):
    memory, models = make_memory(), {name: parameters(name, 8) for name in ("policy", "critic")}
    for name, own in models.items():
        memory.add(name, own)
    memory.start_step()
    with memory.phase("train policy", "policy"):
        pass
    with memory.phase("train critic", "critic"):
        pass
    metrics = memory.finish_step()
    size, small = 8 * PAGE, 2 * PAGE  # of a role, and of what may stay of it
    assert size <= metrics["memory/peak_gb"] * 1e9 <= size + small
    assert metrics["memory/rss_peak_gb"] > 0.01 and metrics["seconds/memory"] > 0
    with memory.phase("outside of a step", "policy", "critic"):
        pass
    memory.write(tmp_path)
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["roles"] == {"policy": size, "critic": size}
    assert [phase["phase"] for phase in report["phases"]] == ["train policy", "train critic"]
    for phase, mine, other in zip(report["phases"], ("policy", "critic"), ("critic", "policy"), strict=True):
        assert phase["cpu"][mine] == size and phase["cpu"][other] <= small
        assert phase["file"] == {other: size - phase["cpu"][other]}
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_no_directory_and_no_room_are_one_line(make_memory, parameters, monkeypatch):
    with pytest.raises(UserError, match="memory.directory: /nowhere: no such directory; make it"):
        make_memory(directory="/nowhere")
    memory = make_memory(directory="/proc")
    with pytest.raises(UserError, match="memory.directory: /proc: 0.0 GB for policy: .*; name a directory on a disk"):
        memory.add("policy", parameters("policy", 8))
    monkeypatch.setattr(os, "posix_fallocate", _no_room)
    with pytest.raises(UserError, match="memory.directory: .*: 0.0 GB for policy: No space left on device; name"):
        make_memory().add("policy", parameters("policy", 8))


def test_a_failed_write_loses_nothing(make_memory, parameters, monkeypatch):
    memory, models = make_memory(), parameters("policy", 8)
    memory.add("policy", models)
    with memory.phase("train", "policy"):
        expected = models[0].asnumpy().copy()
    monkeypatch.setattr(os, "pwrite", _no_room)
    with pytest.raises(UserError, match="writing policy: No space left"), memory.phase("other"):
        pass
    np.testing.assert_array_equal(models[0].asnumpy(), expected)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_failed_read_is_an_error_until_it_succeeds(make_memory, parameters, monkeypatch, prefetch):
    memory, models = make_memory(prefetch=prefetch), {name: parameters(name, 8) for name in ("policy", "critic")}
    for name, own in models.items():
        memory.add(name, own)
    with memory.phase("both", "policy", "critic"):
        pass
    for name in ("policy", "critic"):
        with memory.phase(name, name):
            pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        for _ in range(2):
            with pytest.raises(UserError, match="reading back policy: the file"), memory.phase("policy", "policy"):
                pass
    with memory.phase("policy", "policy"):
        assert models["policy"][0].asnumpy().all()


def _no_room(*_):
    raise OSError(28, os.strerror(28))
