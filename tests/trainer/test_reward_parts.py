"""Rewards opened from a configuration: functions, reward models, process reward models, servers."""

import numpy as np
import pytest

from mindrlhf.config import RewardFunctionConfig as Part
from mindrlhf.config import StepRewardConfig
from mindrlhf.errors import UserError
from mindrlhf.trainer.reward_parts import open_rewards
from mindrlhf.types import Prompt
from tests.servers import write_reward_model
from tests.trainer.stages import DECODER, write_rows

PROMPTS = [Prompt(None, text, "1", i, {}) for i, text in enumerate(["12=", "345=", "7=", "0="])]
ANSWERS = ["one two", "three; four; five", "", "1"]
TEXTS = [prompt.text for prompt in PROMPTS]
STEPS = StepRewardConfig(placeholder=";")


@pytest.fixture(scope="module")
def made(mindspore, tmp_path_factory):
    """A directory with a reward model and a language model that judges steps."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    directory = tmp_path_factory.mktemp("parts")
    write_reward_model(directory / "rm", mindspore, score_mean=0.5, score_std=2.0)
    build(BuildConfig(DECODER, 300, [str(write_rows(directory / "rows.jsonl"))]), 5).write(directory / "prm")
    return directory


@pytest.fixture(scope="module")
def reward_model(made):
    from mindrlhf.trainer.reward_model import RewardModel

    return RewardModel.open(made / "rm")


@pytest.fixture(scope="module")
def judge(made):
    """A function: keys of the part -> a process reward model with them; the weights are shared."""
    from mindrlhf.trainer.process_reward_model import ProcessRewardModel

    first = ProcessRewardModel.open(made / "prm", Part(steps=STEPS))
    return lambda **keys: ProcessRewardModel(first.policy, Part(**{"steps": STEPS, "process": True, **keys}))


def test_every_kind_in_one_sum(made, reward_model, judge, monkeypatch):
    from mindrlhf.rewards import remote

    monkeypatch.setattr(remote, "post", lambda url, body, timeout: {"rewards": [timeout] * 4})
    (made / "mine.py").write_text(
        "def times(completions, factor=1, **columns):\n    return [factor * len(text) for text in completions]\n"
    )
    rewards = open_rewards(
        [
            Part("accuracy"),
            Part("mine.py:times", 0.5, arguments={"factor": 3}),
            Part(model="rm"),
            Part(model="rm", normalize_reward=True, weight=2.0),
            Part(model="prm", process=True, steps=STEPS, step_separator=";", name="steps"),
            Part(urls=["http://localhost:1"], timeout=7.0),
        ],
        made,
    )
    total, parts = rewards(PROMPTS, ANSWERS)
    scores = reward_model.score_texts(TEXTS, ANSWERS)
    expected = {
        "accuracy": [0, 0, 0, 1],
        "times": [21, 51, 0, 3],
        "model": scores,
        "model_2": (scores - 0.5) / 2.0,
        "steps": judge(step_separator=";").score_texts(TEXTS, ANSWERS),
        "remote": [7.0] * 4,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(parts[name], values, atol=1e-5, err_msg=name)
    weights = {"times": 0.5, "model_2": 2.0}
    summed = sum(weights.get(name, 1.0) * np.asarray(values, float) for name, values in expected.items())
    np.testing.assert_allclose(total, summed, rtol=1e-5)


def test_a_score_does_not_depend_on_its_company(reward_model):
    """Packed with others, in fewer rows, in another width: to float32 rounding."""
    together = reward_model.score_texts(TEXTS * 30, ANSWERS * 30).reshape(30, 4)
    alone = [reward_model.score_texts([prompt], [answer])[0] for prompt, answer in zip(TEXTS, ANSWERS, strict=True)]
    np.testing.assert_allclose(together, np.tile(alone, (30, 1)), atol=1e-5)
    assert reward_model.score_texts([], []).shape == (0,)


def test_changing_sizes_do_not_compile_for_ever(reward_model, compilations):
    for count in range(1, 40):
        reward_model.score_texts(["1="] * count, ["one " * (1 + count % 20)] * count)
    assert compilations() <= 5  # of 1, 2, 4, 8 and 16 rows


def test_a_judgement_is_what_training_maximises(judge, made):
    """cross-entropy of the best reward token, from the trainer's own objective on the trainer's own data."""
    from mindrlhf.config import DataConfig, OptimizerConfig, SourceConfig
    from mindrlhf.data.judged_steps import read_judged_steps, step_token_ids
    from mindrlhf.data.packing import Packing
    from mindrlhf.types import StepRewardBatch
    from mindrlhf.wrapper.objectives import StepRewardObjective
    from mindrlhf.wrapper.train_step import TrainStep

    model = judge(step_separator=";", step_reduction="product")
    tokenizer, decoder = model.policy.tokenizer, model.policy.decoder
    (made / "steps.jsonl").write_text('{"input": "345=three;two;five;", "labels": ["+", "+", "+"]}\n')
    data = DataConfig(label_key="labels", prompt_key="none")
    solution = read_judged_steps([SourceConfig(str(made / "steps.jsonl"))], data, tokenizer, 64, made, STEPS).items[0]
    objective = StepRewardObjective(decoder, step_token_ids(tokenizer, STEPS)[1])
    packing = Packing.of([solution.ids], [solution.judged], 1, 64, shift=0)
    weight = packing.spread([np.ones(3, np.float32)])[0]
    best = np.stack([weight, 0 * weight], axis=1)
    batch = StepRewardBatch(*packing.batches[0], weight, best)
    loss, _ = TrainStep(objective, decoder.trainable(), OptimizerConfig()).evaluate([batch])
    # Without prompt_key the problem is a part of the first step.
    (judged,) = model.judgements([""], ["345=three;two;five;"])
    assert judged.shape == (3,) and np.all((judged > 0) & (judged < 1))
    assert -np.log(judged).sum() == pytest.approx(loss, abs=1e-5)
    assert model.score_texts([""], ["345=three;two;five"])[0] == pytest.approx(np.exp(-loss), abs=1e-6)


@pytest.mark.parametrize(
    ("reduction", "reduce"), [("min", min), ("mean", np.mean), ("product", np.prod), ("last", lambda j: j[-1])]
)
def test_reductions(reduction, reduce, judge):
    model = judge(step_reduction=reduction, step_separator="; ")
    judged = model.judgements(TEXTS, ANSWERS)
    assert [len(one) for one in judged] == [1, 3, 1, 1]
    np.testing.assert_allclose(model.score_texts(TEXTS, ANSWERS), [reduce(one) for one in judged], rtol=1e-6)
    assert model.score_texts([], []).shape == (0,)


def test_more_reward_tokens_are_a_scale(judge):
    """Of three tokens the middle one counts a half."""
    model = judge(steps=StepRewardConfig(";", ["+", "-", "x"]))
    turned = judge(steps=StepRewardConfig(";", ["x", "-", "+"]))
    scores, reverse = (one.score_texts(TEXTS, ANSWERS) for one in (model, turned))
    np.testing.assert_allclose(scores + reverse, 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("separator", "answer", "pieces"),
    [
        ("\n", "a\nb", ["a", "\nb"]),
        ("\n", "a\n\n b \n", ["a", "\n\n b "]),
        ("\n", "\na", ["\na"]),
        ("\n", "", [""]),
        ("\n", " \n", [" \n"]),
        (";", "a;b;", ["a", "b"]),
        (";", "a; ;b", ["a", " b"]),
    ],
)
def test_steps_of_an_answer(separator, answer, pieces, judge):
    assert judge(step_separator=separator)._pieces(answer) == pieces


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(model="rm", urls=["http://x"]), "has model and urls; make one entry of each, with weights of their own"),
        (Part("accuracy", model="rm"), "has function and model; make one entry of each"),
        (Part(weight=0.5), "nothing gives the reward; set function, model or urls"),
        (Part(model="rm", arguments={"a": 1}), "arguments is for an entry with function, this one has model; remove"),
        (Part(urls=["http://x"], process=True), "process is for an entry with model, this one has urls; remove it"),
        (
            Part("accuracy", normalize_reward=True),
            "normalize_reward is for an entry with model, this one has function; remove it",
        ),
        (Part(model="rm", timeout=3.0), "timeout is for an entry with urls, this one has model; remove it"),
        (Part(model="rm", step_reduction="mean"), "step_reduction is for a process reward model; set process: true"),
        (Part(model="prm", process=True, normalize_reward=True), "normalize_reward: judgements of steps lie in"),
        (Part(urls=["localhost:1"]), "url 'localhost:1': has no scheme"),
        (Part(urls=["http://localhost:1"], retries=-1), "retries: -1 must be 0 or more"),
        (Part("acuracy"), "reward function 'acuracy': no such name; did you mean 'accuracy'?"),
        (Part(model="nowhere"), "nowhere"),
        (Part(model="prm"), "a language model, not a reward model; train one with `mindrlhf rm`"),
        (Part(model="rm", process=True, steps=STEPS), "a reward model of whole answers, not one of steps; remove proc"),
        (Part(model="prm", process=True, steps=STEPS, step_separator=""), "step_separator: is empty; give what ends"),
        (Part(model="prm", process=True), r"steps.placeholder: '<\|step\|>' is [0-9]+ tokens in this tokenizer"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_mistakes(part, message, made):
    with pytest.raises(UserError, match=rf"^rewards\[1\]: .*{message}"):
        open_rewards([Part("accuracy"), part], made)


def test_what_the_window_does_not_hold(made):
    for part in (Part(model="rm"), Part(model="prm", process=True, steps=STEPS)):
        rewards = open_rewards([part], made)
        with pytest.raises(UserError, match="^reward 'model': a prompt with its answer is .* tokens, .* is 64; lower"):
            rewards(PROMPTS[:1], ["one " * 99])


def test_nothing_to_score(made):
    nothing = [Prompt(None, "", None, 0, {})]
    with pytest.raises(UserError, match="^reward 'model': the reward model was given neither a prompt nor an answer"):
        open_rewards([Part(model="rm")], made)(nothing, [""])
