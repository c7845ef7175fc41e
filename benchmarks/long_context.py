"""Peak memory and time of a training step against the length of a row: whole, in chunks, and with layers recomputed.

    python benchmarks/long_context.py > table.md

Each cell of the table is a process of its own. Memory is the process's peak less what it held before the first step:
weights, MindSpore and Python are not in it; gradients are.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

MODEL = dict(
    hidden_size=128, intermediate_size=352, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=64, tie_embeddings=True,
    qkv_bias=True, model_type="qwen2",
)  # fmt: skip
COLUMNS = {
    "whole": {"logits_at_once": 0},
    "in chunks": {},
    "and recomputed": {"recompute": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=2, help="timed, behind one that compiles")
    parser.add_argument("--limit", type=float, default=12.0, help="GB that a process may take; more: no figure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(**json.loads(options.child))))
        return
    print(f"| tokens a row | {' | '.join(COLUMNS)} | time, in chunks | time, recomputed |")
    print("| ---: |" + " ---: |" * (len(COLUMNS) + 2), flush=True)
    for length in options.lengths:
        found = [child(options, length, compute) for compute in COLUMNS.values()]
        cells = [f"{one['memory']:,.0f} MB" if one else "over the limit" for one in found]
        for one in found[1:]:
            cells.append(f"{one['seconds'] / found[0]['seconds']:.2f}" if one and found[0] else "")
        print(f"| {length:,} | {' | '.join(cells)} |", flush=True)


def child(options: argparse.Namespace, length: int, compute: dict) -> dict | None:
    work = {"length": length, "vocabulary": options.vocabulary, "steps": options.steps, "compute": compute}
    command = [sys.executable, __file__, "--child", json.dumps(work)]
    limit = int(options.limit * 1e9)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=limited)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measured(length: int, vocabulary: int, steps: int, compute: dict) -> dict[str, float]:
    """MB over the start, and seconds a step (the fastest), of supervised training on one full row."""
    from mindrlhf.utils.parallel import start

    start()
    import numpy as np

    from mindrlhf.config import OptimizerConfig
    from mindrlhf.models.compute import Compute
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.types import SupervisedBatch
    from mindrlhf.wrapper.objectives import SupervisedObjective
    from mindrlhf.wrapper.train_step import TrainStep

    config = DecoderConfig(vocab_size=vocabulary, max_positions=length, compute=Compute(**compute), **MODEL)
    decoder = Decoder(config, random_weights(config, 0))
    step = TrainStep(SupervisedObjective(decoder), decoder.trainable(), OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, vocabulary, (1, length)).astype(np.int32)
    places, ones = np.arange(length, dtype=np.int32), np.ones(length, np.float32)
    batch = SupervisedBatch(
        tokens, places[None], np.ones_like(tokens), places, np.roll(tokens[0], -1), np.zeros_like(places), ones,
        ones / length,
    )  # fmt: skip
    before = resident()
    seconds = []
    for _ in range(steps + 1):
        clock = time.perf_counter()
        result = step([batch], 1e-4)
        seconds.append(time.perf_counter() - clock)
    return {"memory": peak() - before, "seconds": min(seconds[1:]), "loss": result.loss}


def resident() -> float:
    """MB that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    """The most MB that it has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
