"""Multi-turn and partial answers: contexts, masks, rewards, budgets, and that interrupting changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindrlhf.config import SamplingConfig
from mindrlhf.environments import Environment, load_environment
from mindrlhf.errors import UserError
from mindrlhf.types import Prompt, Rollout

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent"
END, CALL = 1, 5  # the tokenizer's own stop token, and the environment's
SAMPLING = SamplingConfig(temperature=0.8, max_tokens=24)


class Letters:
    """A tokenizer of one letter a token: id i is chr(i + 48); END is special."""

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) - 48 for letter in text] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(int(i) + 48) for i in row if not (skip_special_tokens and i == END)) for row in rows]


LETTERS = Letters()


class Echo(Environment):
    """Says how many letters it heard; done when a turn has no CALL at its end. Reward: the turn's number."""

    stop = (chr(CALL + 48),)

    def reset(self, prompt):
        self.heard, self.turns, self.prompt = [], 0, prompt
        return "AB"

    def step(self, text):
        self.heard.append(text)
        self.turns += 1
        return f"<{len(text)}>", float(self.turns), not text.endswith(self.stop[0])


@pytest.fixture(scope="module")
def decoder(mindspore, micro_config):
    from mindrlhf.models.decoder import Decoder, random_weights

    return Decoder(micro_config, random_weights(micro_config, 0))


@pytest.fixture(scope="module")
def generator(decoder):
    from mindrlhf.wrapper.generator import Generator

    return Generator(decoder, slots=8, max_prompt_tokens=16, max_tokens=24, stop_ids=(END, CALL))


@pytest.fixture(scope="module")
def play(generator):
    from mindrlhf.trainer.episodes import play

    def run(prompts, count, make=Echo, max_turns=4, sampling=SAMPLING, seed=3, own=None):
        return play(own or generator, LETTERS, prompts, count, sampling, seed, make, max_turns)

    return run


@pytest.fixture(scope="module")
def conversations(play, micro_prompts):
    """(rollouts, their environments): three answers to each of ten prompts."""
    environments = []

    def make():
        environments.append(Echo())
        return environments[-1]

    return play(micro_prompts, 3, make), environments


def answers(rollouts):
    return [(r.prompt_ids.tolist(), r.response_ids.tolist(), r.sampled_logprobs.tolist()) for r in rollouts]


def runs(rollout):
    """[(sampled, start, end)] of the answer's stretches."""
    edges = [0, *(np.flatnonzero(np.diff(rollout.is_sampled.astype(int))) + 1), len(rollout.response_ids)]
    return [(bool(rollout.is_sampled[a]), int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False)]


def test_turns_observations_and_rewards_stand_where_they_happened(conversations, micro_prompts):
    rollouts, environments = conversations
    seen_turns = set()
    for number, (rollout, environment) in enumerate(zip(rollouts, environments, strict=True)):
        prompt = micro_prompts[number // 3]
        assert environment.prompt is prompt and rollout.group == number // 3
        assert rollout.prompt_ids.tolist() == [*prompt.ids, ord("A") - 48, ord("B") - 48]
        assert rollout.is_sampled[0] and rollout.is_sampled[-1]  # an observation that nobody answers is dropped
        stretches = runs(rollout)
        turns = [(a, b) for sampled, a, b in stretches if sampled]
        observed = [(a, b) for sampled, a, b in stretches if not sampled]
        texts = LETTERS.batch_decode([rollout.response_ids[a:b] for a, b in turns], skip_special_tokens=True)
        ended = [bool(rollout.response_ids[b - 1] in (END, CALL)) for _, b in turns]
        heard = [text for text, end in zip(texts, ended, strict=True) if end]
        assert environment.heard == heard  # the stop token that is a letter stays in the text, END does not
        assert [LETTERS.batch_decode([rollout.response_ids[a:b]], False)[0] for a, b in observed] == [
            f"<{len(text)}>" for text in heard[: len(observed)]
        ]
        assert not rollout.sampled_logprobs[~rollout.is_sampled].any()
        assert (rollout.sampled_logprobs[rollout.is_sampled] < 0).all()
        expected = np.zeros(len(rollout.response_ids))
        for turn, ((_, b), end) in enumerate(zip(turns, ended, strict=True), 1):
            expected[b - 1] = turn if end else 0
        assert rollout.token_rewards.tolist() == expected.tolist()
        assert rollout.finished == (rollout.response_ids[-1] == END)
        assert len(rollout.response_ids) <= SAMPLING.max_tokens
        seen_turns.add(len(turns))
    assert len(seen_turns) > 1 and {rollout.finished for rollout in rollouts} == {True, False}


def test_every_sampled_token_had_the_whole_conversation_as_context(conversations, decoder):
    from mindrlhf.data.packing import Packing
    from mindrlhf.wrapper.scorer import Scorer

    rollouts, _ = conversations
    sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
    targets = [np.concatenate([np.zeros(len(r.prompt_ids), bool), r.is_sampled]) for r in rollouts]
    packing = Packing.of(sequences, targets, 4, 48)
    scored = packing.collect(Scorer(decoder, SAMPLING.temperature).score(packing.batches))
    for rollout, logprobs in zip(rollouts, scored, strict=True):
        np.testing.assert_allclose(rollout.sampled_logprobs[rollout.is_sampled], logprobs, atol=1e-5)


def test_a_conversation_does_not_depend_on_its_batch(conversations, decoder, play, micro_prompts):
    from mindrlhf.wrapper.generator import Generator

    whole = [rollout.response_ids.tolist() for rollout in conversations[0]]
    backwards = [rollout.response_ids.tolist() for rollout in play(micro_prompts[::-1], 3)]
    assert whole == [ids for i in range(27, -1, -3) for ids in backwards[i : i + 3]]
    alone = Generator(decoder, slots=1, max_prompt_tokens=16, max_tokens=24, stop_ids=(END, CALL))
    few = play(micro_prompts[2:4], 3, own=alone)
    assert [rollout.response_ids.tolist() for rollout in few] == whole[6:12]
    assert len({tuple(ids) for ids in whole}) > 20  # samples of a group differ


def test_the_first_turn_is_what_generate_gives(conversations, generator, micro_prompts):
    """Draws have the same keys: the prompts with the reset's text, by generate."""
    prompts = [Prompt(np.append(p.ids, [17, 18]).astype(np.int32), "", None, p.key) for p in micro_prompts]
    plain = generator.generate(prompts, 3, SAMPLING, 3)
    for rollout, expected in zip(conversations[0], plain, strict=True):
        assert rollout.response_ids[: len(expected.response_ids)].tolist() == expected.response_ids.tolist()


def test_max_turns_cuts_off(play, micro_prompts):
    rollouts = play(micro_prompts, 2, max_turns=1)
    stopped_by_call = [rollout for rollout in rollouts if rollout.response_ids[-1] == CALL]
    assert stopped_by_call and all(rollout.is_sampled.all() for rollout in rollouts)
    for rollout in stopped_by_call:
        assert not rollout.finished and rollout.token_rewards[-1] == 1.0


def test_an_observation_over_the_budget_ends_the_answer(play, micro_prompts):
    class Talker(Echo):
        def step(self, text):
            return "x" * 30, 0.5, False

    class Quiet(Echo):
        def step(self, text):
            return "", 0.5, False

    for rollout in play(micro_prompts, 1, Talker):
        assert rollout.is_sampled.all() and not rollout.finished
        assert rollout.token_rewards[-1] == (0.5 if rollout.response_ids[-1] in (END, CALL) else 0.0)
    for rollout in play(micro_prompts, 1, Quiet, max_turns=50):
        assert len(rollout.response_ids) == SAMPLING.max_tokens and not rollout.finished
        stops = np.isin(rollout.response_ids, (END, CALL))
        assert rollout.token_rewards.tolist() == (0.5 * stops).tolist()


def test_a_reset_over_the_window_is_an_error(play, micro_prompts):
    class Long(Echo):
        def reset(self, prompt):
            return "A" * 16

    with pytest.raises(UserError, match="prompt 0 and the text of the environment's reset have 17 tokens.*1 to 16"):
        play(micro_prompts[:1], 1, Long)


@pytest.mark.parametrize(
    "returned, message",
    [
        (("a", 1.0), r"returned \('a', 1.0\) instead of \(observation, reward, done\)"),
        ((None, 1.0, True), "a NoneType as observation"),
        (("a", float("nan"), True), "nan as reward"),
        (("a", "1", True), "'1' as reward"),
        (("a", 1.0, 1), "1 as done"),
    ],
)
def test_a_wrong_return_is_one_line(returned, message):
    from mindrlhf.environments import take_turn

    class Wrong(Echo):
        def step(self, text):
            return returned

    with pytest.raises(UserError, match=message) as caught:
        take_turn(Wrong(), "a")
    assert "\n" not in str(caught.value) and "Wrong.step" in str(caught.value) and __file__ in str(caught.value)


def test_numpy_values_are_taken():
    from mindrlhf.environments import take_turn

    class Numpy(Echo):
        def step(self, text):
            return "a", np.float32(0.5), np.bool_(True)

    assert take_turn(Numpy(), "a") == ("a", 0.5, True)


@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
def test_an_exception_names_its_line(play, micro_prompts, method):
    def fails(self, *arguments):
        raise KeyError("oh")

    broken = type("Broken", (Echo,), {method: fails, "__module__": __name__})
    line = fails.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"{__file__}:{line}: KeyError: 'oh'"):
        play(micro_prompts, 1, broken)


def test_a_reset_must_return_a_text(play, micro_prompts):
    class Nothing(Echo):
        def reset(self, prompt):
            return None

    with pytest.raises(UserError, match="Nothing.reset .* returned a NoneType instead of a text"):
        play(micro_prompts[:1], 1, Nothing)


def test_loading_an_environment(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mindrlhf.environments import Environment\n"
        "class Mine(Environment):\n    stop = ['x']\n    def step(self, text):\n        return '', 0.0, True\n"
        "class Half:\n    def reset(self, prompt):\n        return ''\n"
        "class Stop(Mine):\n    stop = 'x'\n"
        "three = 3\n"
    )
    assert load_environment("mine.py:Mine", tmp_path)().step("") == ("", 0.0, True)
    wrong = {
        "mine.py": "write it as path.py:Class",
        "other.py:Mine": "no such file",
        "mine.py:Mines": "did you mean 'Mine'",
        "mine.py:three": "three is a int, not a class",
        "mine.py:Half": "no method step",
        "mine.py:Stop": "stop is 'x', not a list",
    }
    for spec, message in wrong.items():
        with pytest.raises(UserError, match=message):
            load_environment(spec, tmp_path)


def test_an_environment_without_step_says_so():
    from mindrlhf.environments import take_turn

    with pytest.raises(UserError, match="needs step"):
        take_turn(Environment(), "")


def test_describe():
    from mindrlhf.trainer.episodes import describe

    def made(sampled, rewards):
        n = len(sampled)
        arrays = np.zeros(n, np.int32), np.zeros(n, np.float32)
        mask = np.array(sampled, bool)
        return Rollout(np.ones(1, np.int32), *arrays, True, 0, sampled=mask, token_rewards=np.array(rewards))

    metrics = describe([made([1, 1, 0, 0, 1, 0, 1], [0, 0.5, 0, 0, 0, 0, 1]), made([1], [0.0])])
    assert metrics == {"turns": 2.0, "environment_tokens": 3 / 8, "environment_reward": 0.75}
    assert describe([])["turns"] == 0


# -- partial rollouts -----------------------------------------------------------------------------------------------


def finish(partial, generator, seed):
    """Every group that is still open, in the order in which they come."""
    done = []
    while partial.groups:
        done += partial.advance(generator, [], 3, SAMPLING, seed)
    return done


@pytest.mark.parametrize("tokens", [1, 5, 7, 100])
def test_interrupted_answers_are_those_of_one_generation(generator, micro_prompts, tokens):
    from mindrlhf.trainer.episodes import PartialRollouts

    whole = generator.generate(micro_prompts, 3, SAMPLING, 7)
    partial = PartialRollouts(tokens)
    done = partial.advance(generator, micro_prompts, 3, SAMPLING, 7)
    done += finish(partial, generator, 99)  # later seeds have no part in answers that have begun
    assert sorted(prompt.key for prompt, _ in done) == list(range(10))
    for prompt, group in done:
        expected = whole[3 * prompt.key : 3 * prompt.key + 3]
        for rollout, one in zip(group, expected, strict=True):
            assert rollout.response_ids.tolist() == one.response_ids.tolist()
            assert rollout.finished == one.finished
            assert rollout.sampled is None and rollout.token_rewards is None
            np.testing.assert_allclose(rollout.sampled_logprobs, one.sampled_logprobs, atol=1e-5)


def test_groups_come_out_whole_and_new_ones_are_added(generator, micro_prompts):
    from mindrlhf.trainer.episodes import PartialRollouts

    partial = PartialRollouts(8)
    first = partial.advance(generator, micro_prompts[:4], 3, SAMPLING, 7)
    assert len(first) + len(partial.groups) == 4 and partial.groups
    lengths = [len(episode.response) for _, group in partial.groups for episode in group]
    assert max(lengths) == 8
    second = partial.advance(generator, micro_prompts[4:6], 3, SAMPLING, 8)
    for released in (first, second):
        assert [rollout.group for _, group in released for rollout in group] == [
            number for number in range(len(released)) for _ in range(3)
        ]
    keys = [prompt.key for prompt, _ in first + second + finish(partial, generator, 9)]
    assert sorted(keys) == list(range(6))


def test_partial_rollouts_are_saved_and_restored(generator, micro_prompts):
    from mindrlhf.trainer.episodes import PartialRollouts

    partial = PartialRollouts(6)
    partial.advance(generator, micro_prompts, 3, SAMPLING, 7)
    state = json.loads(json.dumps(partial.state()))
    restored = PartialRollouts(6)
    restored.load_state(state, micro_prompts)
    assert restored.state() == partial.state() and restored.groups
    ours, theirs = finish(partial, generator, 8), finish(restored, generator, 8)
    assert [answers(group) for _, group in ours] == [answers(group) for _, group in theirs]


def test_new_weights_go_on_with_what_the_old_ones_began(mindspore, micro_config, micro_decoder, micro_prompts):
    from mindrlhf.models.decoder import random_weights
    from mindrlhf.trainer.episodes import PartialRollouts
    from mindrlhf.wrapper.generator import Generator

    generator = Generator(micro_decoder, slots=8, max_prompt_tokens=16, max_tokens=24)
    old = generator.generate(micro_prompts, 1, SAMPLING, 7)
    partial = PartialRollouts(10)
    assert partial.advance(generator, micro_prompts, 1, SAMPLING, 7) == []
    generator.sync(random_weights(micro_config, 9))
    for (_, (rollout,)), before in zip(finish(partial, generator, 8), old, strict=True):
        assert rollout.response_ids[:10].tolist() == before.response_ids[:10].tolist()
        assert rollout.sampled_logprobs[:10].tolist() == before.sampled_logprobs[:10].tolist()
        assert rollout.response_ids[10:].tolist() != before.response_ids[10:].tolist()


def test_the_calculator_says_what_the_warm_up_shows(tmp_path):
    """And a rollout, whose pieces are tokenised apart, has the tokens that the warm-up trains."""
    from mindrlhf.data.tokenizers import build_tokenizer, encode, load_tokenizer, stop_ids
    from mindrlhf.environments import take_turn

    calculator = load_environment("calculator.py:Calculator", EXAMPLE)
    warmup = EXAMPLE / "data" / "multiplication_warmup.jsonl"
    build_tokenizer([warmup], 320, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert stop_ids(tokenizer, None, list(calculator.stop))[1:] == tuple(encode(tokenizer, [")"])[0])
    rows = [json.loads(line) for line in warmup.read_text().splitlines()]
    calls = [row["prompt"] + row["response"] for row in rows if "calc" in row["response"]]
    assert len(calls) == 300 and len(rows) == 900
    for text in calls:
        call, bracket, rest = text.partition(")")
        observation, reward, done = take_turn(calculator(), call.partition("=")[2] + bracket)
        assert rest.startswith(observation) and (reward, done) == (0.0, False)
        final = rest[len(observation) :]
        assert take_turn(calculator(), final) == ("", 0.0, True)
        prompt, _, turn = (call + bracket).partition("=")
        pieces = encode(tokenizer, [prompt + "=", turn, observation, final])
        assert np.concatenate(pieces).tolist() == encode(tokenizer, [text])[0].tolist()
    assert take_turn(calculator(), "calc(1+2)") == (" error\n", -0.1, False)
