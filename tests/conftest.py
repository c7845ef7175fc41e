"""Shared by all tests: MindSpore in graph mode with its share of the threads, and micro models."""

import gc
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.utils.parallel import prepare_environment, usable_cores

# Under `pytest -n` the workers share the cores: threads that wait for one another cost more than they save.
os.environ.setdefault(
    "OMP_NUM_THREADS", str(max(1, usable_cores() // int(os.getenv("PYTEST_XDIST_WORKER_COUNT", "1"))))
)
prepare_environment()
os.environ.setdefault("MINDRLHF_COMPILE_CACHE", "0")  # commands that tests run leave nothing in the user's directory

MEASURED = pytest.StashKey[dict[str, dict[str, float]]]()


def pytest_addoption(parser):
    parser.addoption("--families-report", metavar="FILE", help="write what the tests of the families measured, as JSON")


def pytest_configure(config):
    config.stash[MEASURED] = {}


def pytest_sessionfinish(session):
    path = session.config.getoption("--families-report")
    if path:
        Path(path).write_text(json.dumps(session.config.stash[MEASURED], indent=1), encoding="utf-8")


@pytest.fixture()
def measured(request):
    """A function: fixture, quantity, error, its limit -> fails over it, else the report gets the largest error.

    Without an error: that it was done.
    """

    def record(name, quantity, value=0.0, limit=0.0):
        assert value <= limit, f"{quantity} of {name}: {value:.3g} is over {limit:g}"
        values = request.config.stash[MEASURED].setdefault(name, {})
        values[quantity] = max(value, values.get(quantity, 0.0))

    return record


@pytest.fixture(scope="session")
def mindspore():
    """MindSpore, started as the command line starts it."""
    from mindrlhf.utils.parallel import start

    start()
    import mindspore

    # MindSpore collects garbage before every compilation; what has been imported by now is never any.
    gc.collect()
    gc.freeze()
    return mindspore


@pytest.fixture(scope="session")
def micro_config():
    """A Qwen2 shape with grouped queries, tied, small enough to compile in a second."""
    from mindrlhf.models.config import DecoderConfig

    return DecoderConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=128, qkv_bias=True, tie_embeddings=True, model_type="qwen2", initializer_range=0.3,
    )  # fmt: skip


@pytest.fixture()
def micro_decoder(mindspore, micro_config):
    """A new decoder for every test: training must not reach another test."""
    from mindrlhf.models.decoder import Decoder, random_weights

    return Decoder(micro_config, random_weights(micro_config, 0))


@pytest.fixture(scope="session")
def micro_prompts():
    """Ten prompts of 1 to 11 tokens; token 1 is the stop token of the tests."""
    from mindrlhf.types import Prompt

    random = np.random.default_rng(0)
    lengths = [1, 2, 5, 11, 7, 3, 8, 4, 9, 6]
    return [Prompt(random.integers(2, 48, n).astype(np.int32), "", None, key) for key, n in enumerate(lengths)]


@pytest.fixture()
def compilations(mindspore, monkeypatch):
    """How many graphs were compiled since the test began: a function that returns the count."""
    from mindspore.nn.cell import _cell_graph_executor

    count = [0]
    compile_graph = _cell_graph_executor._graph_executor.compile

    class Counting:
        def __init__(self, inner):
            self._inner = inner

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def __call__(self, *arguments, **keywords):
            return self._inner(*arguments, **keywords)

        def compile(self, *arguments, **keywords):
            count[0] += 1
            return compile_graph(*arguments, **keywords)

    monkeypatch.setattr(_cell_graph_executor, "_graph_executor", Counting(_cell_graph_executor._graph_executor))
    return lambda: count[0]


@pytest.fixture(params=["PYNATIVE_MODE", "GRAPH_MODE"], ids=["eager", "compiled"])
def mode(request):
    """MindSpore's mode, eager and then compiled."""
    import mindspore

    before = mindspore.get_context("mode")
    mindspore.set_context(mode=getattr(mindspore, request.param))
    yield mindspore.get_context("mode")
    mindspore.set_context(mode=before)
