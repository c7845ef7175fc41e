"""`mindrlhf score`: a reward model's scores of the answers in a file."""

import argparse
from pathlib import Path
from typing import Any

from mindrlhf.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score a file of answers with a reward model: rows with a prompt and a response, or with a prompt, a chosen "
        "and a rejected answer, as for training."
    )
    parser.add_argument("--model", required=True, help="a reward model's checkpoint directory, made by `mindrlhf rm`")
    parser.add_argument("--data", required=True, help="a .json, .jsonl, .csv or .parquet file")
    parser.add_argument("--output", help="write every row with its scores as JSON lines here")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.key=value",
        help="how to read the file, for example data.response_key=answer data.apply_chat_template=true",
    )


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.cli import inference
    from mindrlhf.config import InferenceConfig, SourceConfig, load_config
    from mindrlhf.data.readers import read_rows

    inference.check_output(arguments.output)
    data = load_config(InferenceConfig, None, arguments.overrides).data
    data.test = [SourceConfig(path=str(Path(arguments.data).resolve()))]
    first = read_rows(data.test[0].path, 1)[0].values
    paired = data.chosen_key in first and data.rejected_key in first
    if not data.strict or data.format == "text":
        raise UserError("every row gets a score, so data.strict stays true and data.format is not text; remove it")
    if paired and data.format != "prompt":
        raise UserError(f"data.format: {data.format} rows have one answer, but {arguments.data} holds pairs; remove it")
    values, rows = _scored_pairs(arguments.model, data) if paired else _scored_answers(arguments.model, data)
    inference.print_values(values)
    if arguments.output:
        inference.write_rows(arguments.output, rows)
        print(f"{len(rows)} rows in {arguments.output}")
    return 0


def _scored_pairs(model: str, data: Any) -> tuple[dict[str, float | int], list[dict[str, Any]]]:
    import numpy as np

    from mindrlhf.data.preferences import read_preferences

    reward_model, examples = _open(model, data, read_preferences)
    answers = [answer for pair in examples for answer in (pair.chosen, pair.rejected)]
    chosen, rejected = reward_model.scores(answers).reshape(-1, 2).T
    values = {
        "pairs": len(examples),
        "accuracy": float(np.mean(np.where(chosen == rejected, 0.5, chosen > rejected))),
        "mean_chosen": float(chosen.mean()),
        "mean_rejected": float(rejected.mean()),
    }
    numbers = (chosen, rejected, reward_model.normalized(chosen), reward_model.normalized(rejected))
    names = ("chosen_score", "rejected_score", "chosen_normalized", "rejected_normalized")
    return values, _rows(data, names, numbers)


def _scored_answers(model: str, data: Any) -> tuple[dict[str, float | int], list[dict[str, Any]]]:
    from mindrlhf.data.conversations import read_conversations
    from mindrlhf.data.readers import read_rows

    reward_model, examples = _open(model, data, read_conversations)
    if len(examples) != len(read_rows(data.test[0].path, data.max_rows)):
        raise UserError(
            f"{data.test[0].path}: a conversation has turns that the chat template renders apart, so that it would get "
            "several scores; keep one assistant turn a row"
        )
    scores = reward_model.scores(examples)
    values = {"answers": len(examples), "mean": float(scores.mean()), "std": float(scores.std())}
    return values, _rows(data, ("score", "normalized"), (scores, reward_model.normalized(scores)))


def _open(model: str, data: Any, read: Any) -> tuple[Any, list[Any]]:
    """The reward model, and the examples of the file, one for each of its rows."""
    from mindrlhf.utils.parallel import start

    start()
    from mindrlhf.trainer.reward_model import RewardModel

    reward_model = RewardModel.open(model)
    policy = reward_model.policy
    return reward_model, read(data.test, data, policy.tokenizer, policy.decoder.config.max_positions, Path()).items


def _rows(data: Any, names: tuple[str, ...], numbers: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The file's rows with the scores as further columns."""
    from mindrlhf.data.readers import read_rows

    columns = zip(*(values.tolist() for values in numbers), strict=True)
    rows = read_rows(data.test[0].path, data.max_rows)
    return [
        {**row.values, **{name: round(value, 6) for name, value in zip(names, values, strict=True)}}
        for row, values in zip(rows, columns, strict=True)
    ]
