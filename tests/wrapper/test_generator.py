"""Cached generation against the full-recompute oracle, and its invariances."""

import numpy as np
import pytest

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.types import Prompt

STOP = 1


@pytest.fixture(scope="module")
def decoder(mindspore, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights

    return Decoder(micro_config, random_weights(micro_config, 0))


@pytest.fixture(scope="module")
def generator(decoder):
    from mindrlhf.wrapper.generator import Generator

    return Generator(decoder, slots=4, max_prompt_tokens=16, max_tokens=24, stop_ids=(STOP,))


def _key(rollouts, num_generations):
    return {(r.group, i % num_generations): r.response_ids.tolist() for i, r in enumerate(rollouts)}


def test_greedy_equals_full_recompute(decoder, micro_prompts):
    from mindrlhf.wrapper.generator import Generator
    from mindrlhf.wrapper.recompute import RecomputeGenerator

    generator = Generator(decoder, slots=4, max_prompt_tokens=16, max_tokens=40)
    rollouts = generator.generate(micro_prompts, 1, SamplingConfig(temperature=0, max_tokens=40), 0)
    oracle = RecomputeGenerator(decoder).generate([prompt.ids for prompt in micro_prompts], 40)
    assert [rollout.response_ids.tolist() for rollout in rollouts] == oracle


def test_an_answer_is_the_same_in_any_batch_slot_and_order(decoder, generator, micro_prompts):
    from mindrlhf.wrapper.generator import Generator

    sampling = SamplingConfig(max_tokens=20)
    whole = _key(generator.generate(micro_prompts, 3, sampling, 7), 3)
    backwards = _key(generator.generate(micro_prompts[::-1], 3, sampling, 7), 3)
    last = len(micro_prompts) - 1
    assert whole == {(last - group, sample): ids for (group, sample), ids in backwards.items()}
    alone = Generator(decoder, slots=1, max_prompt_tokens=16, max_tokens=24, stop_ids=(STOP,))
    assert _key(alone.generate(micro_prompts[3:5], 3, sampling, 7), 3) == {
        (group - 3, sample): whole[group, sample] for group in (3, 4) for sample in range(3)
    }
    assert whole != _key(generator.generate(micro_prompts, 3, sampling, 8), 3)
    assert len({tuple(ids) for ids in whole.values()}) > 20  # samples of a group differ


def test_a_prompt_that_comes_twice_gets_other_answers_the_second_time(generator, micro_prompts):
    sampling = SamplingConfig(max_tokens=20)
    once = generator.generate(micro_prompts[:1], 4, sampling, 7)
    twice = generator.generate([micro_prompts[0], micro_prompts[1], micro_prompts[0]], 2, sampling, 7)
    texts = [rollout.response_ids.tolist() for rollout in once]
    assert [rollout.response_ids.tolist() for rollout in twice[:2] + twice[4:]] == texts


def test_sampled_logprobs_are_those_of_the_scorer(decoder, generator, micro_prompts):
    """Under the sampling temperature, whatever top-k and top-p kept: on one engine the mismatch is rounding."""
    from mindrlhf.data.packing import Packing
    from mindrlhf.wrapper.scorer import Scorer

    sampling = SamplingConfig(temperature=0.7, top_k=10, top_p=0.9, max_tokens=20)
    rollouts = generator.generate(micro_prompts, 2, sampling, 3)
    sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
    targets = [np.arange(len(s)) >= len(r.prompt_ids) for s, r in zip(sequences, rollouts, strict=True)]
    packing = Packing.of(sequences, targets, 4, 48)
    scored = packing.collect(Scorer(decoder, 0.7).score(packing.batches))
    for rollout, logprobs in zip(rollouts, scored, strict=True):
        np.testing.assert_allclose(rollout.sampled_logprobs, logprobs, atol=2e-5)


def test_slots_are_refilled_and_a_prompt_is_prefilled_once(generator, micro_prompts):
    sampling = SamplingConfig(max_tokens=20)
    steps, prefilled = generator.decode_steps, generator.prefilled
    rollouts = generator.generate(micro_prompts, 3, sampling, 7)
    assert generator.prefilled - prefilled == len(micro_prompts)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    longest = max(len(rollout.response_ids) for rollout in rollouts)
    # Waiting for the longest of every four answers would take the sum of the batches' maxima.
    batches = [rollouts[i : i + 4] for i in range(0, len(rollouts), 4)]
    waiting = sum(max(len(rollout.response_ids) for rollout in batch) for batch in batches)
    assert generator.decode_steps - steps < waiting
    assert generator.decode_steps - steps <= tokens / 4 + longest


def test_finished_means_a_stop_token_at_the_end(generator, micro_prompts):
    rollouts = generator.generate(micro_prompts, 6, SamplingConfig(max_tokens=20), 5)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert (rollout.response_ids[-1] == STOP) == rollout.finished
        assert STOP not in rollout.response_ids[:-1]
        assert rollout.finished or len(rollout.response_ids) == 20
        assert len(rollout.sampled_logprobs) == len(rollout.response_ids)


def test_nothing_recompiles_in_the_loop(generator, micro_prompts, compilations):
    """One prefill and one insertion for every power of two of prompt length, one decode graph for all."""
    generator.generate(micro_prompts, 3, SamplingConfig(max_tokens=20), 7)
    generator.generate(micro_prompts[:2], 1, SamplingConfig(max_tokens=20), 7)
    before = compilations()
    for seed in range(3):
        generator.generate(micro_prompts, 3, SamplingConfig(max_tokens=20 - seed, temperature=1 + seed), seed)
    generator.sync()
    generator.generate(micro_prompts[:2], 5, SamplingConfig(max_tokens=20), 7)
    assert compilations() == before


def test_sync_brings_new_weights(mindspore, micro_config, micro_decoder, micro_prompts):
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.wrapper.generator import Generator

    greedy = SamplingConfig(temperature=0, max_tokens=8)
    generator = Generator(micro_decoder, slots=4, max_prompt_tokens=16, max_tokens=24)
    before = _key(generator.generate(micro_prompts[:4], 1, greedy, 0), 1)
    micro_decoder.load(random_weights(micro_config, 9))
    assert _key(generator.generate(micro_prompts[:4], 1, greedy, 0), 1) == before
    generator.sync()
    assert _key(generator.generate(micro_prompts[:4], 1, greedy, 0), 1) != before


def test_repetition_penalty_ends_repetition(decoder, generator, micro_prompts):
    plain = generator.generate(micro_prompts, 1, SamplingConfig(temperature=0, max_tokens=20), 0)
    penalised = generator.generate(
        micro_prompts, 1, SamplingConfig(temperature=0, max_tokens=20, repetition_penalty=1e4), 0
    )
    assert any(len(set(rollout.response_ids.tolist())) < len(rollout.response_ids) for rollout in plain)
    for rollout in penalised:
        seen = rollout.prompt_ids.tolist() + rollout.response_ids.tolist()
        assert len(set(rollout.response_ids.tolist()) - set(rollout.prompt_ids.tolist())) == len(rollout.response_ids)
        assert len(seen) >= len(rollout.response_ids)


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 1.0}, {"repetition_penalty": 0.0}, {"max_tokens": 0}]
)
def test_sampling_out_of_range_is_one_clear_error(generator, micro_prompts, change):
    (name,) = change
    with pytest.raises(UserError, match=name):
        generator.generate(micro_prompts, 1, SamplingConfig(**{"max_tokens": 4, **change}), 0)


def test_a_prompt_over_the_window_is_an_error(generator):
    with pytest.raises(UserError, match="17 tokens.*max_prompt_tokens"):
        generator.generate([Prompt(np.ones(17, np.int32), "", None, 0)], 1, SamplingConfig(max_tokens=4), 0)


def test_a_window_over_the_model_is_an_error(decoder):
    from mindrlhf.wrapper.generator import Generator

    with pytest.raises(UserError, match="window of 128 positions"):
        Generator(decoder, slots=1, max_prompt_tokens=100, max_tokens=100)


def test_streamed_tokens_are_those_of_the_answers(generator, micro_prompts):
    sampling, streamed = SamplingConfig(max_tokens=20), {}
    rollouts = generator.generate(
        micro_prompts, 2, sampling, 7, lambda answer, token: streamed.setdefault(answer, []).append(token)
    )
    assert [streamed[number] for number in range(20)] == [rollout.response_ids.tolist() for rollout in rollouts]
    assert _key(rollouts, 2) == _key(generator.generate(micro_prompts, 2, sampling, 7), 2)


def test_a_token_is_streamed_before_the_next_is_decoded(generator, micro_prompts):
    steps = []
    generator.generate(
        micro_prompts[:1], 1, SamplingConfig(max_tokens=9), 1, lambda *_: steps.append(generator.decode_steps)
    )
    assert len(steps) > 1 and steps == list(range(steps[0], steps[0] + len(steps)))


@pytest.mark.parametrize("after", [1, 9])
def test_an_interrupted_generator_goes_on(generator, micro_prompts, after):
    """Some slots full, prompts waiting; the next call must see nothing of it."""
    sampling, tokens = SamplingConfig(max_tokens=20), []
    expected = _key(generator.generate(micro_prompts, 3, sampling, 7), 3)

    def stop(answer, token):
        tokens.append(token)
        if len(tokens) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(micro_prompts[::-1], 3, sampling, 8, stop)
    assert len(tokens) == after
    assert _key(generator.generate(micro_prompts, 3, sampling, 7), 3) == expected


def test_widths_of_prompts(decoder):
    from mindrlhf.wrapper.generator import Generator

    plain = Generator(decoder, 4, 100, 20)
    assert [plain.prompt_width(n) for n in (1, 8, 9, 64, 65, 100)] == [8, 8, 16, 64, 128, 128]
    wide = Generator(decoder, 4, 80, 16, least_width=48)
    assert [wide.prompt_width(n) for n in (1, 48, 49, 80)] == [48, 48, 96, 96]
    assert Generator(decoder, 1, 40, 20, least_width=48).prompt_width(50) == 64  # what the cache holds
