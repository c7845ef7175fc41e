"""mindrlhf/trainer/ray_workers.py: answers and scores of local actors are those of this process."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.trainer.ray_workers import RemoteRewardServer, RolloutPool, share_prompts
from mindrlhf.types import Prompt

SAMPLING = SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=8)


def prompts_of(keys, length=4):
    return [Prompt(np.arange(3, 3 + length + key % 3, dtype=np.int32), "", None, key) for key in keys]


def test_shares_are_even_and_keep_a_prompt_together():
    assert share_prompts(prompts_of([5, 6, 7, 8]), 2) == [[0, 2], [1, 3]]
    assert share_prompts(prompts_of([5, 6, 5, 7, 5, 8]), 2) == [[0, 2, 4], [1, 3, 5]]
    assert share_prompts(prompts_of([5]), 3) == [[0], [], []]


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^Ray is not installed: pip install 'mindrlhf\[ray\]'$"):
        RolloutPool("model", 1, 8, 8, 8)
    with pytest.raises(UserError, match="^workers: 0 is not 1 or more"):
        RolloutPool("model", 0, 8, 8, 8)


def test_a_server_needs_a_token(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    monkeypatch.delenv("MINDRLHF_REWARD_TOKEN", raising=False)
    with pytest.raises(UserError, match="^MINDRLHF_REWARD_TOKEN: not set"):
        RemoteRewardServer("model")


@pytest.fixture(scope="module")
def cluster(mindspore):
    """Two cores of this machine. Its environment is that of a rank of another job, and not prepared for MindSpore."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION")
        patch.setenv("RANK_SIZE", "2")
        patch.setenv("RANK_ID", "1")
        patch.setenv("MINDRLHF_STORE", "127.0.0.1:9")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_workers_answer_as_one_generator(cluster, teacher):
    """With as many threads, bit by bit. Before and after new weights, with a prompt that comes twice."""
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.trainer.roles import open_checkpoint
    from mindrlhf.wrapper.generator import Generator

    policy = open_checkpoint(teacher)
    old, new = policy.decoder.weights, random_weights(policy.decoder.config, 99)
    old = {name: old(name).copy() for name in policy.decoder.by_name}.__getitem__
    prompts = prompts_of([0, 1, 2, 1, 3])
    found = []
    for workers in (2, 1):
        policy.decoder.load(old)
        pool = RolloutPool(str(teacher), workers, slots=4, max_prompt_tokens=8, max_tokens=8, stop=["+"])
        before = pool.generate(prompts, 3, SAMPLING, seed=7)
        policy.decoder.load(new)
        pool.sync(policy.decoder)
        found.append((before, pool.generate(prompts, 3, SAMPLING, seed=7)))
        with pytest.raises(UserError, match="^prompt 4 has 13 tokens; the window takes 1 to 8"):
            pool.generate(prompts_of([4], length=12), 1, SAMPLING, seed=7)
        pool.close()
    for two, one in zip(*found, strict=True):
        assert [rollout.state() for rollout in two] == [rollout.state() for rollout in one]
    before, after = found[0]
    assert not np.array_equal(before[3].response_ids, before[9].response_ids)  # of the prompt that comes twice
    assert any(not np.array_equal(a.response_ids, b.response_ids) for a, b in zip(before, after, strict=True))
    # This process's, whose other number of threads rounds otherwise.
    local = Generator(policy.decoder, 4, 8, 8, policy.stop_ids(["+"]))
    for ours, theirs in zip(local.generate(prompts, 3, SAMPLING, seed=7), after, strict=True):
        assert (ours.group, ours.finished) == (theirs.group, theirs.finished)
        np.testing.assert_array_equal(ours.response_ids, theirs.response_ids)
        np.testing.assert_allclose(ours.sampled_logprobs, theirs.sampled_logprobs, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there(cluster):
    with pytest.raises(UserError, match="nowhere"):
        RolloutPool("nowhere", 1, 8, 8, 8)


@pytest.mark.slow
def test_a_reward_server_scores(cluster, mindspore, tmp_path, monkeypatch):
    from mindrlhf.rewards.remote import RemoteReward
    from mindrlhf.trainer.reward_model import RewardModel
    from tests.servers import write_reward_model

    model = write_reward_model(tmp_path / "model", mindspore)
    monkeypatch.setenv("MINDRLHF_REWARD_TOKEN", "secret")
    server = RemoteRewardServer(str(model))
    try:
        found = RemoteReward([server.url])(["1+2=3", "4+5=8"], ["1+2=", "4+5="], [None, None])
        expected = RewardModel.open(model).score_texts(["1+2=", "4+5="], ["3", "8"])
        np.testing.assert_allclose(found["rewards"], expected, rtol=1e-6)
    finally:
        server.close()
    with pytest.raises(UserError, match="the reward server did not start, exit code 2: .*nowhere"):
        RemoteRewardServer("nowhere")
