"""Resharding between layouts against the bare collective that moves the same bytes, round by round in one run.

    python benchmarks/reshard.py --workers 2

Bytes are those that go from one process to another, all of them together. Where none do, the bare side is a copy.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.layout import Layout

MODEL = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_layers": 4,
    "num_heads": 12,
    "num_kv_heads": 12,
    "head_dim": 64,
    "max_positions": 512,
    "qkv_bias": True,
    "tie_embeddings": True,
    "model_type": "qwen2",
}
ONE, FOUR_TENSOR, TWO_BY_TWO = Layout(), Layout(tensor=4), Layout(data=2, tensor=2)
PAIRS = {  # workers -> source, target, and MindSpore's collective for it where there is one
    2: [
        (Layout(tensor=2), Layout(data=2), "all_gather"),
        (Layout(tensor=2), ONE, ""),
        (ONE, Layout(tensor=2), ""),
        (ONE, Layout(data=2), "broadcast"),
        (Layout(data=2), Layout(tensor=2), ""),
    ],
    4: [
        (FOUR_TENSOR, Layout(data=4), "all_gather"),
        (TWO_BY_TWO, Layout(data=4), "all_gather"),
        (TWO_BY_TWO, FOUR_TENSOR, ""),
        (FOUR_TENSOR, TWO_BY_TWO, ""),
        (ONE, Layout(data=4), "broadcast"),
        (Layout(data=4), FOUR_TENSOR, ""),
    ],
}
CHUNK = 4 << 20  # bytes of one bare message, the fastest size for these as well
Run = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, choices=PAIRS, default=2, help="processes; default 2")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each side; the first warms up; default 6")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there as JSON")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds} leaves nothing after the warm-up; it must be 2 or more")
    if "RANK_ID" in os.environ:
        measure(options)
    else:
        raise SystemExit(start_workers(options.workers))


def start_workers(count: int) -> int:
    """This program once a rank; the first that fails ends the others. Returns the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"OMP_NUM_THREADS": "1", "RANK_SIZE": str(count), "MINDRLHF_STORE": f"127.0.0.1:{port}"}
    workers = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **place, "RANK_ID": str(rank)})
        for rank in range(count)
    ]
    try:
        while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
            time.sleep(0.2)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return max(abs(worker.returncode) for worker in workers)


def measure(options: argparse.Namespace) -> None:
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.shapes import expected_shapes
    from mindrlhf.utils import parallel

    parallel.start(threads=1)
    shapes = expected_shapes(DecoderConfig(**MODEL))
    size = sum(map(math.prod, shapes.values())) * 4
    report: dict[str, Any] = {"model": MODEL, "model_bytes": size, "workers": options.workers}
    report |= {"rounds": options.rounds - 1, "pairs": []}
    if parallel.is_main():
        print(f"model {size / 1e6:.0f} MB, {options.workers} processes, medians of {options.rounds - 1} rounds, GB/s")
        print(f"{'from':20} {'to':20} {'MB':>6} {'reshard':>8} {'checked':>8}  bare")
    for source, target, collective in PAIRS[options.workers]:
        row = measure_pair(shapes, source, target, collective, options.rounds)
        report["pairs"].append(row)
        if parallel.is_main():
            bare = ", ".join(f"{name} {rate:.3f}" for name, rate in row["bare"].items())
            print(
                f"{row['from']:20} {row['to']:20} {row['bytes'] / 1e6:6.0f} {row['reshard']:8.3f} {row['checked']:8.3f}"
                f"  {bare}; ratio to the fastest {row['ratio']:.2f}",
                flush=True,
            )
    if options.output and parallel.is_main():
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    parallel.gather_objects(None)


def measure_pair(shapes, source: Layout, target: Layout, collective: str, rounds: int) -> dict[str, Any]:
    """GB/s of resharding, of resharding with checksums, and of each bare side."""
    from mindrlhf.utils.reshard import Resharder
    from mindrlhf.utils.reshard_plan import volume

    resharder = Resharder(shapes, source, target)
    plan, rank = resharder.plan, resharder.rank
    held, wanted = (
        {name: layout.place(rank) and plan.held(layout, rank, name) for name in shapes} for layout in (source, target)
    )
    mine = {name: np.ones([b - a for a, b in spans], np.float32) for name, spans in held.items() if spans}
    got = {name: np.zeros([b - a for a, b in spans], np.float32) for name, spans in wanted.items() if spans}

    def write(name, box, array):
        got[name][box] = array

    size = plan.moved or sum(plan.copied)
    sides: dict[str, Run] = {
        "reshard": lambda: resharder.run(mine.__getitem__, write),
        "checked": lambda: resharder.run(mine.__getitem__, write, check=got.__getitem__),
    }
    if not plan.moved:
        sides["copy"] = bare_copy(sum(volume(spans) for spans in wanted.values() if spans))
    else:
        sides["send and receive"] = bare_messages(plan, rank)
        if collective:
            sides[collective] = bare_collective(collective, source, target, rank, plan)
    seconds = alternate(sides, rounds)
    rates = {name: size / 1e9 / value for name, value in seconds.items()}
    bare = {name: rate for name, rate in rates.items() if name not in ("reshard", "checked")}
    return {
        "from": source.describe(), "to": target.describe(), "bytes": plan.moved, "copied": sum(plan.copied),
        "reshard": rates["reshard"], "checked": rates["checked"], "bare": bare,
        "ratio": rates["reshard"] / max(bare.values()),
    }  # fmt: skip


def alternate(sides: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each, from when all ranks are ready to when all are done."""
    from mindrlhf.utils.parallel import gather_objects

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            gather_objects(None)
            start = time.perf_counter()
            run()
            gather_objects(None)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bare_copy(elements: int) -> Run:
    source, target = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    return lambda: np.copyto(target, source)


def chunks(size: float) -> list:
    """Tensors of the bytes of one side, in memory that is there already and, like a model's, in no cache."""
    from mindspore import Tensor

    array = np.ones(round(size) // 4, np.int32)
    return [Tensor.from_numpy(array[start : start + CHUNK // 4]) for start in range(0, array.size, CHUNK // 4)]


def bare_messages(plan, rank: int) -> Run:
    """The same bytes between the same ranks in the same turns."""
    from mindspore.mint import distributed

    from mindrlhf.utils.reshard_plan import volume

    def side(sender: int, receiver: int) -> list:
        return chunks(4 * sum(volume(spans) for _, spans in plan.parts(sender, receiver)))

    turns = [(partner, side(rank, partner), side(partner, rank)) for partner in plan.partners(rank)]

    def run():
        for partner, leaving, coming in turns:
            for step in range(max(len(leaving), len(coming))):
                if rank < partner and step < len(leaving):
                    distributed.send(leaving[step], partner)
                if step < len(coming):
                    distributed.recv(coming[step], partner)
                    coming[step].asnumpy()
                if rank > partner and step < len(leaving):
                    distributed.send(leaving[step], partner)

    return run


def bare_collective(kind: str, source: Layout, target: Layout, rank: int, plan) -> Run:
    """all_gather among the ranks of a copy of the source, or broadcast from rank 0 to all of the target."""
    from mindspore.mint import distributed

    from mindrlhf.utils.parallel import group_name

    ranks = source.group(rank, "tensor") if kind == "all_gather" else tuple(range(target.size))
    group, size = group_name(ranks), max(plan.sent) / (len(ranks) - 1)
    messages = chunks(size)
    arrived = list(zip(*(chunks(size) for _ in ranks), strict=True)) if kind == "all_gather" else []

    def run():
        for step, message in enumerate(messages):
            if kind == "all_gather":
                distributed.all_gather(list(arrived[step]), message, group=group)
                arrived[step][0].asnumpy()
            else:
                distributed.broadcast(message, 0, group=group)
                message.asnumpy()

    return run


if __name__ == "__main__":
    main()
