"""Compiled graphs of an earlier start: the same numbers, and never the graph of something else."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.utils import compile_cache
from mindrlhf.utils.compile_cache import KEPT, CompileCache, Unknown, digest
from mindrlhf.wrapper.policy_objectives import PolicyLoss, PolicyObjective
from mindrlhf.wrapper.sampling import next_token
from mindrlhf.wrapper.scorer import Scorer
from tests.processes import ROOT


@pytest.fixture(autouse=True)
def graph_mode(mindspore):
    return mindspore


def test_the_key_of_a_cell_is_its_content(micro_config):
    weights = random_weights(micro_config, 0)
    one, same = (Scorer(Decoder(micro_config, weights), 0.7) for _ in range(2))
    assert digest(one) == digest(same)
    assert digest(one) == digest(Scorer(Decoder(micro_config, random_weights(micro_config, 1)), 0.7))
    others = [Scorer(one.decoder, 0.71), PolicyObjective(one.decoder, PolicyLoss())]
    others.append(PolicyObjective(one.decoder, PolicyLoss(eps_low=0.1)))
    changed = Scorer(Decoder(micro_config, weights), 0.7)
    changed.decoder.cos = Tensor(changed.decoder.cos.asnumpy() + 1)  # a constant of the graph
    others.append(changed)
    assert len({digest(cell) for cell in (one, *others)}) == 5


def test_the_key_of_values():
    table = [1, 1.0, True, "1", b"1", None, (1,), [1], {"a": 1}, {1}, np.float32(1), np.arange(3), Tensor([1, 2, 3])]
    table += [np.arange(3.0), Tensor([1, 2, 4]), Parameter(Tensor([1, 2, 3]), name="a")]
    table += [PolicyLoss(), PolicyLoss(kl_coef=0.5), next_token, functools.partial(next_token, 1)]
    table += [SimpleNamespace(a=1), SimpleNamespace(a=2)]
    table += [Parameter(Tensor([1, 2, 3]), name="b"), Parameter(Tensor([1, 2]), name="a")]
    keys = [digest(value) for value in table]
    assert len(set(keys)) == len(table) and keys == [digest(value) for value in table]
    shared = [1]
    assert digest([shared, shared]) != digest([shared, [2]])


def test_what_is_not_known_has_no_key():
    for value in (graph_mode, lambda: 1, SimpleNamespace(a=test_the_key_of_values), iter([1]), type("Own", (), {})()):
        with pytest.raises(Unknown):
            digest(value)


def job(root, number):
    """A directory as a job leaves it; the higher the number, the later it was used."""
    made = root / f"{number:016x}"
    made.mkdir(parents=True)
    (made / "lock").touch()
    os.utime(made, (number, number))
    return made


def test_only_old_jobs_are_removed_and_none_in_use(tmp_path):
    users = tmp_path / "thesis"
    users.mkdir()
    os.utime(users, (0, 0))
    jobs = [job(tmp_path, number) for number in range(1, KEPT + 4)]
    lock = compile_cache._locked(jobs[0])
    compile_cache._remove_old(tmp_path)
    os.close(lock)
    assert users.is_dir() and [one.is_dir() for one in jobs] == [True, False, False] + [True] * KEPT


class Graph:
    """As much of a cell as the cache sees; a call adds 1, and has been compiled."""

    def __init__(self, value):
        self.value, self.compile_cache = value, set()

    def __call__(self, number):
        self.compile_cache.add(number)
        return self.value + number


def test_a_disk_that_fails_turns_it_off(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "digest", lambda *values: "key")
    monkeypatch.setattr(compile_cache, "set_compile_cache", lambda *_: None)
    cache, graph = CompileCache(tmp_path / "job"), Graph(1)
    monkeypatch.setattr(cache, "_write", full)
    assert cache.run(graph, (2,), graph) == 3 and cache.is_off
    monkeypatch.setattr(compile_cache, "digest", full)  # not asked any more
    assert cache.run(graph, (3,), graph) == 4


def test_an_interrupted_graph_turns_it_off(tmp_path, monkeypatch):
    """MindSpore may have counted it or not, and every later number would be uncertain."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_cache, "digest", lambda *values: "key")
    monkeypatch.setattr(compile_cache, "set_compile_cache", lambda *_: None)
    cache = CompileCache(tmp_path / "job")
    with pytest.raises(KeyboardInterrupt):
        cache.run(Graph(1), (2,), interrupt)
    assert cache.is_off and cache.count == 0


def run(directory, clip):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINDRLHF_COMPILE_CACHE": str(directory)}
    command = [sys.executable, str(ROOT / "tests" / "compile_job.py"), "1", str(clip)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return report["loaded"], report["numbers"]


@pytest.mark.slow  # five processes
def test_a_second_start_loads_its_graphs_and_no_others(tmp_path):
    (first, numbers), (second, again) = run(tmp_path, 0.2), run(tmp_path, 0.2)
    assert first == [0, 6] and second == [6, 6] and again == numbers
    (changed, others), (none, expected) = run(tmp_path, 0.01), run(0, 0.01)
    assert changed == [0, 6] and none == [0, 0] and others == expected != numbers
    (interrupted,) = (tmp_path / "mindrlhf-graphs").iterdir()
    keys = (interrupted / "keys").read_text().split()
    (interrupted / "keys").write_text("\n".join(keys[:2]))
    assert run(tmp_path, 0.01) == ([2, 6], others)
