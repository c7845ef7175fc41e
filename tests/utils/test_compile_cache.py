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
from mindrlhf.utils.compile_cache import Unknown, digest
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
    (interrupted,) = tmp_path.iterdir()
    keys = (interrupted / "keys").read_text().split()
    (interrupted / "keys").write_text("\n".join(keys[:2]))
    assert run(tmp_path, 0.01) == ([2, 6], others)
