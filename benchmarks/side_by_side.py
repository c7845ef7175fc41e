"""What the benchmarks share: the model's sizes, rounds that alternate with torch in one run, the report.

A round of ours and a round of torch's follow each other, so that whatever else the machine does hits both; medians
over all rounds are compared. The side that waits is blocked, not spinning.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
from pathlib import Path

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 4,
    "max_positions": 512,
}
BATCH, TOKENS, PROMPT_TOKENS = 16, 192, 32
PAIRS = 8  # of preference.py


def pair_lengths() -> list[int]:
    """Tokens of the 2 * PAIRS answers, 32 to 160."""
    draw = random.Random(0)
    return [draw.randint(32, TOKENS - PROMPT_TOKENS) for _ in range(2 * PAIRS)]


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--torch-python", metavar="PATH", help="a Python with torch and transformers; none: ours alone")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each side; the first warms up, uncounted")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there as JSON")
    parsed = parser.parse_args()
    if parsed.rounds < 2:
        parser.error(f"--rounds {parsed.rounds} leaves nothing after the warm-up; it must be 2 or more")
    return parsed


def start_mindspore(threads: int):
    """MindSpore in graph mode, its threads limited; imported here so that --help is instant."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from mindrlhf.utils.parallel import start

    start(threads)


def policy():
    """The decoder of MODEL, Qwen2's flags, random weights."""
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.decoder import Decoder, random_weights

    head_dim = MODEL["hidden_size"] // MODEL["num_heads"]
    config = DecoderConfig(**MODEL, head_dim=head_dim, qkv_bias=True, tie_embeddings=True, model_type="qwen2")
    return Decoder(config, random_weights(config, 0))


class TorchSide:
    """torch_baseline.py in a process of its own: one line in, one round, one line of JSON out."""

    def __init__(self, python: str, what: str, threads: int):
        script = Path(__file__).with_name("torch_baseline.py")
        sizes = json.dumps(
            {**MODEL, "batch": BATCH, "tokens": TOKENS, "prompt_tokens": PROMPT_TOKENS, "answers": pair_lengths()}
        )
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, str(script), what, str(threads), sizes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def round(self) -> dict[str, list[float]]:
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the torch side ended with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(ours, what: str, options: argparse.Namespace) -> None:
    """ours(): one round, {name: list of seconds}, as the torch side gives them. Prints and writes the report."""
    torch = TorchSide(options.torch_python, what, options.threads) if options.torch_python else None
    sides = {"mindrlhf": ours, **({"torch": torch.round} if torch else {})}
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for number in range(options.rounds):
        for side, run in sides.items():
            for name, values in run().items():
                if number:
                    seconds[side].setdefault(name, []).extend(values)
    if torch:
        torch.close()
    report = {"benchmark": what, "model": MODEL, "batch": BATCH, "tokens": TOKENS, "rounds": options.rounds - 1}
    report |= {"threads": options.threads, "kernels": _kernels(), "milliseconds": {}}
    for name in seconds["mindrlhf"]:
        row = {side: _summary(seconds[side][name]) for side in sides}
        if torch:
            row["times_faster_than_torch"] = round(row["torch"]["median"] / row["mindrlhf"]["median"], 3)
        report["milliseconds"][name] = row
        parts = [f"{side} {row[side]['median']:.2f} ms (fastest {row[side]['fastest']:.2f})" for side in sides]
        print(f"{name}: {', '.join(parts)}" + (f", {row['times_faster_than_torch']:.2f} times" if torch else ""))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def _kernels() -> str:
    from mindrlhf.models import cpu_kernels

    reason = cpu_kernels.available()
    return reason or "own"


def _summary(seconds: list[float]) -> dict[str, float]:
    values = [value * 1e3 for value in seconds]
    return {"median": round(statistics.median(values), 3), "fastest": round(min(values), 3), "count": len(values)}
