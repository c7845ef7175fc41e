"""`mindrlhf generate --post-process` and `mindrlhf score`: from a model to the next round's data set, which trains."""

import json

import numpy as np
import pytest

from mindrlhf.cli.main import main
from tests.trainer.stages import DECODER, write_rows


@pytest.fixture(scope="module")
def made(mindspore, tmp_path_factory):
    """A directory with rows.jsonl, a random model and a random reward model of the same vocabulary."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    directory = tmp_path_factory.mktemp("made")
    config = BuildConfig(DECODER, 300, [str(write_rows(directory / "rows.jsonl"))])
    build(config, 3).write(directory / "model")
    reward_model = build(config, 4, head="score")
    head = reward_model.decoder.by_name["score.weight"]
    head.set_data(mindspore.Tensor(np.random.default_rng(0).standard_normal(head.shape, np.float32)))
    reward_model.write(directory / "reward_model")
    return directory


def run(*words):
    return main([str(word) for word in words])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(made, output, *words):
    return run(
        "generate", "--model", made / "model", "--data", made / "rows.jsonl", "--output", output,
        "num_generations=3", "sampling.max_tokens=6", "data.max_rows=5", *words,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "command", "rows"), [("rs", "sft", 5), ("csft", "sft", 15), ("iter_dpo", "dpo", 5)])
def test_a_round(kind, command, rows, made, tmp_path, capsys):
    output = tmp_path / "next.jsonl"
    model = ("--reward-model", made / "reward_model")
    assert generate(made, output, "--post-process", kind, *model) == 0
    assert f"{rows} rows in {output}" in capsys.readouterr().out
    written = read(output)
    prompts = [row["prompt"] for row in read(made / "rows.jsonl")[:5]]
    each = 3 if kind == "csft" else 1
    assert all(row["prompt"].startswith(prompts[number // each]) for number, row in enumerate(written))
    trained = run(
        command, "--config", made / "empty.yaml", f"model.path={made / 'model'}", f"output={tmp_path / 'run'}",
        f"data.train=[{{path: {output}}}]", "training.batch_size=4", "trainer.steps=2", "logging.progress=false",
        "logging.tensorboard=false",
    )  # fmt: skip
    assert trained == 0 and (tmp_path / "run" / "summary.json").is_file()


@pytest.fixture(scope="module", autouse=True)
def empty_config(made):
    (made / "empty.yaml").write_text("seed: 1\n")


def test_the_best_are_the_best_by_the_reward_model(made, tmp_path):
    """The chosen answers score highest when they are scored again, as rows of a file."""
    generate(made, tmp_path / "all.jsonl", "--post-process", "csft", "--reward-model", made / "reward_model")
    generate(made, tmp_path / "pairs.jsonl", "--post-process", "iter_dpo", "--reward-model", made / "reward_model")
    everything, pairs = read(tmp_path / "all.jsonl"), read(tmp_path / "pairs.jsonl")
    for number, pair in enumerate(pairs):
        rewards = [row["reward"] for row in everything[3 * number : 3 * number + 3]]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(rewards), min(rewards))


def test_rewards_are_what_score_gives_to_the_written_rows(made, tmp_path):
    """Answers that were cut, too: each is scored with its stop token."""
    generate(made, tmp_path / "best.jsonl", "--post-process", "rs", "--reward-model", made / "reward_model")
    run("score", "--model", made / "reward_model", "--data", tmp_path / "best.jsonl", "--output", tmp_path / "scored")
    for row in read(tmp_path / "scored"):
        assert row["score"] == pytest.approx(row["reward"], abs=1e-5)


def test_rewards_of_functions(made, tmp_path):
    (tmp_path / "mine.py").write_text("def short(completions, **_):\n    return [-len(c) for c in completions]\n")
    rewards = f"rewards=[{{function: {tmp_path}/mine.py:short}}]"
    assert generate(made, tmp_path / "best.jsonl", "--post-process", "rs", rewards) == 0
    assert all(row["reward"] == -len(row["response"]) for row in read(tmp_path / "best.jsonl"))


def test_score_of_pairs_and_of_answers(made, tmp_path, capsys):
    pairs, answers = tmp_path / "pairs.jsonl", tmp_path / "answers.jsonl"
    model = ("--model", made / "reward_model", "--data", made / "rows.jsonl")
    assert run("score", *model, "--output", pairs) == 0
    printed = capsys.readouterr().out
    rows = read(pairs)
    accuracy = np.mean([row["chosen_score"] > row["rejected_score"] for row in rows])
    assert len(rows) == 24 and f"{accuracy:.4f}" in printed and "pairs" in printed
    assert run("score", *model, "--output", answers, "data.chosen_key=none", "data.response_key=rejected") == 0
    for row, pair in zip(read(answers), rows, strict=True):
        assert row["score"] == pytest.approx(pair["rejected_score"], abs=1e-5)
        assert row["prompt"] == pair["prompt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward-model", "x"], "--reward-model and --normalize-reward are for --post-process"),
        (["--post-process", "rs", "--normalize-reward"], "--normalize-reward: needs --reward-model"),
        (["--post-process", "iter_dpo", "num_generations=1"], "num_generations: 1; iter_dpo compares answers"),
        (["--post-process", "rs", "--reward-model", "nowhere"], "nowhere"),
        (["--post-process", "rs", "--reward-model", "MODEL"], "a language model, not a reward model"),
    ],
)
def test_mistakes_of_generate(words, message, made, tmp_path, capsys):
    words = [str(made / "model") if word == "MODEL" else word for word in words]
    assert generate(made, tmp_path / "x.jsonl", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "x.jsonl").exists()


def test_mistakes_of_score(made, tmp_path, capsys):
    model = ("score", "--model", made / "reward_model", "--data", made / "rows.jsonl")
    (tmp_path / "there").write_text("")
    for words, message in (
        ((*model, "--output", tmp_path / "there"), "exists already"),
        (("score", "--model", made / "model", "--data", made / "rows.jsonl"), "not a reward model"),
        ((*model, "data.chosen_key=none", "data.response_key=answer"), "no column 'answer'"),
        ((*model, "data.format=text"), "every row gets a score, so data.strict stays true and data.format is not text"),
        ((*model, "data.strict=false"), "every row gets a score"),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [("generate", "--prompt", "1="), ("eval", "--data", "ROWS"), ("bench", "generate")], ids=str
)
def test_a_reward_model_does_not_answer(words, made, capsys):
    name, *rest = (str(made / "rows.jsonl") if word == "ROWS" else word for word in words)
    assert run(name, *rest, "--model", made / "reward_model") == 2
    error = capsys.readouterr().err
    assert "reward_model: a reward model, which has no lm_head.weight; give a language model" in error
