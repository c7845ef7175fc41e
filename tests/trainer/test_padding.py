"""Padding equal to the stop token: masks say what is padding, never an id.

Checkpoints often have one token for both, as the tokenizers that this suite trains do. Rows and caches are padded with
id 0; so the sharpest case is a stop token of id 0 that stands in prompts too.
"""

import numpy as np
import pytest

from mindrlhf.config import BuildConfig, DataConfig, GRPOConfig, SamplingConfig, SourceConfig
from mindrlhf.data.conversations import read_conversations
from mindrlhf.data.packing import Packing
from mindrlhf.data.preferences import read_preferences
from mindrlhf.data.tokenizers import encode, train_tokenizer
from mindrlhf.types import Prompt, Rollout

ROW = '{"prompt": "a<|endoftext|>b", "response": "cd", "chosen": "cd", "rejected": "e"}\n'


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    return SourceConfig(str(tmp_path / "rows.jsonl"))


@pytest.fixture
def tokenizer(source):
    tokenizer = train_tokenizer(BuildConfig(vocab_size=260, tokenizer_files=[source.path]))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return tokenizer


def targets(sequences, tokenizer):
    """The texts that a packed batch of them has as labels."""
    packing = Packing.of([s.ids for s in sequences], [s.trained for s in sequences], 2, 64)
    return [
        tokenizer.decode(packing.batches[number].labels[place][packing.batches[number].mask[place] > 0])
        for number, place in packing.slots
    ]


def test_answers_are_trained_to_stop(source, tokenizer, tmp_path):
    conversations = read_conversations([source], DataConfig(), tokenizer, 64, tmp_path).items
    assert targets(conversations, tokenizer) == ["cd<|endoftext|>"] * 3
    pairs = read_preferences([source], DataConfig(), tokenizer, 64, tmp_path).items
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    assert targets(answers, tokenizer) == ["cd<|endoftext|>", "e<|endoftext|>"] * 3


def test_sampled_stop_tokens_are_trained(mindspore, tokenizer):
    from mindrlhf.layout import ONE_PROCESS
    from mindrlhf.trainer.updates import pack

    prompt, answer = encode(tokenizer, ["a<|endoftext|>b", "cd<|endoftext|>"])
    rollouts = [Rollout(prompt, answer, np.zeros(len(answer), np.float32), True, 0)] * 2
    (batch,) = pack(rollouts, GRPOConfig(), ONE_PROCESS).batches
    assert tokenizer.decode(batch.labels[batch.mask > 0]) == "cd<|endoftext|>" * 2


@pytest.fixture(scope="module")
def renamed(mindspore, micro_config):
    """token -> (a decoder, the same with the ids 0 and that token exchanged)."""
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.models.shapes import EMBEDDING

    weights = random_weights(micro_config, 0)

    def exchanged(token):
        def of(name):
            array = weights(name).copy()
            if name == EMBEDDING:
                array[[0, token]] = array[[token, 0]]
            return array

        return Decoder(micro_config, of)

    return Decoder(micro_config, weights), exchanged


def exchange(ids, token):
    ids = np.asarray(ids, np.int32)
    return np.where(ids == 0, token, np.where(ids == token, 0, ids)).astype(np.int32)


def test_the_id_of_padding_may_end_answers(renamed, micro_prompts):
    """Greedy answers under both numberings: one with a cache, padded prompts and the stop token 0, one without any."""
    from mindrlhf.wrapper.generator import Generator
    from mindrlhf.wrapper.recompute import RecomputeGenerator

    decoder, exchanged = renamed
    prompts = [micro_prompts[number] for number in (2, 4, 6)]  # of one padded width: one compilation
    oracle = RecomputeGenerator(decoder).generate([prompt.ids for prompt in prompts], 12)
    stop = oracle[0][3]  # any token that is sampled
    expected = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in oracle]
    assert any(len(answer) < 12 for answer in expected)
    generator = Generator(exchanged(stop), slots=2, max_prompt_tokens=16, max_tokens=12, stop_ids=(0,))
    asked = [Prompt(exchange(prompt.ids, stop), "", None, prompt.key) for prompt in prompts]
    rollouts = generator.generate(asked, 1, SamplingConfig(temperature=0, max_tokens=12), 0)
    assert [exchange(rollout.response_ids, stop).tolist() for rollout in rollouts] == expected
    assert [rollout.finished for rollout in rollouts] == [stop in answer for answer in oracle]


def test_the_id_of_padding_is_scored_like_any_other(renamed):
    from mindrlhf.wrapper.scorer import Scorer

    decoder, exchanged = renamed
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 6, length).astype(np.int32) for length in (9, 5, 14)]
    trained = [np.arange(len(ids)) >= 3 for ids in sequences]
    before = Scorer(decoder, 1.0).score(Packing.of(sequences, trained, 2, 64).batches)
    other = Packing.of([exchange(ids, 5) for ids in sequences], trained, 2, 64).batches
    for ours, theirs in zip(before, Scorer(exchanged(5), 1.0).score(other), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_another_padding_token_changes_nothing(source, tokenizer, tmp_path):
    before = read_conversations([source], DataConfig(), tokenizer, 64, tmp_path).items
    tokenizer.pad_token = "<|im_end|>"
    after = read_conversations([source], DataConfig(), tokenizer, 64, tmp_path).items
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.ids, two.ids)
        np.testing.assert_array_equal(one.trained, two.trained)
