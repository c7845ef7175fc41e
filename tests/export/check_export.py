"""Checkpoints of this package opened by torch and transformers: the same prompt ids, the same greedy tokens.

`make check-export CHECKPOINT=DIR` runs both halves; it makes .venv-torch for this one, unless TORCH_PYTHON names a
Python with torch 2.13.0 and transformers 4.57.1. By hand:

    mindrlhf generate --model DIR --prompt "12+34=" --output answers.jsonl sampling.temperature=0 sampling.max_tokens=32
    TORCH_PYTHON tests/export/check_export.py --checkpoint DIR --answers answers.jsonl

Imports nothing of mindrlhf: what it needs to read a checkpoint is transformers alone. Exit code 1 where they differ.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

LOGPROB_TOLERANCE = 1e-3  # of a whole answer and token; both sides compute in float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint directory that mindrlhf wrote")
    parser.add_argument("--answers", required=True, help="what `mindrlhf generate --output` wrote at temperature 0")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in Path(arguments.answers).read_text(encoding="utf-8").splitlines()]
    if not rows:
        sys.exit(f"{arguments.answers}: no answers")
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    model, loading = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    problems = [f"{kind}: {sorted(names)}" for kind, names in loading.items() if names]
    for number, row in enumerate(rows, 1):
        problems += [f"answer {number}: {problem}" for problem in differences(model, tokenizer, row)]
    for problem in problems:
        print(problem, file=sys.stderr)
    tokens = sum(len(row["ids"]) for row in rows)
    print(f"{len(rows)} answers, {tokens} tokens: {'differ' if problems else 'the same'}")
    return 1 if problems else 0


def differences(model, tokenizer, row: dict) -> list[str]:
    """One line for each thing in which transformers does otherwise than the row says."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    if prompt != row["prompt_ids"]:
        return [f"the prompt is {prompt} here, {row['prompt_ids']} there"]
    ids = greedy(model, prompt, len(row["ids"]))
    problems = []
    if ids != row["ids"]:
        problems.append(f"the answer is {ids} here, {row['ids']} there")
    ends = model.generation_config.eos_token_id
    if row["finished"] and row["ids"][-1] not in (ends if isinstance(ends, list) else [ends]):
        problems.append(f"it ended at {row['ids'][-1]}, which is none of generation_config.json's ends, {ends}")
    text = tokenizer.decode(row["ids"], skip_special_tokens=True)
    if text != row["completion"]:
        problems.append(f"the text is {text!r} here, {row['completion']!r} there")
    logprob = answer_logprob(model, prompt, row["ids"])
    if abs(logprob - row["logprob"]) > LOGPROB_TOLERANCE * len(row["ids"]):
        problems.append(f"the answer's log-prob is {logprob:.4f} here, {row['logprob']:.4f} there")
    return problems


def greedy(model, prompt: list[int], length: int) -> list[int]:
    """transformers' own generation, with its cache."""
    plain = GenerationConfig(  # and not the checkpoint's, which may set penalties
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,
    )
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=plain)
    return output[0, len(prompt) :].tolist()


def answer_logprob(model, prompt: list[int], ids: list[int]) -> float:
    """Sum over the answer's tokens, in one pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item()


if __name__ == "__main__":
    sys.exit(main())
