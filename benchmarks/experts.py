"""A layer's experts side by side: each over its own tokens (our kernel) against all over all tokens (MindSpore's
primitives), in rounds that alternate. Training is forward and backward of 3000 tokens, decoding forward of a few with
the generator's layout of the weights. Milliseconds are medians, the ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

# width, inner width, experts, experts a token
LAYERS = {"8 experts, 2 a token": (512, 1024, 8, 2), "32 experts, 4 a token": (512, 256, 32, 4)}
WORK = {"training, 3000 tokens": (3000, False), "decoding, 16 tokens": (16, True), "decoding, 64 tokens": (64, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of each side, behind one that warms up (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="of each side (default: 2)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report there as JSON")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds} must be 1 or more")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from mindrlhf.models import cpu_kernels
    from mindrlhf.utils.parallel import start

    start(options.threads)
    if cpu_kernels.available():
        raise SystemExit(f"there is nothing to compare: {cpu_kernels.available()}")
    print("| layer | work | grouped, ms | all over all, ms | times faster |\n| --- | --- | --- | --- | --- |")
    report = []
    for layer, sizes in LAYERS.items():
        for work, (tokens, decodes) in WORK.items():
            ours, theirs, ratio = measure(*sizes, tokens, decodes, options.rounds)
            print(f"| {layer} | {work} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} |", flush=True)
            report.append({"layer": layer, "work": work, "grouped": ours, "all": theirs, "times_faster": ratio})
    if options.output:
        text = json.dumps({"threads": options.threads, "rounds": options.rounds, "milliseconds": report}, indent=2)
        options.output.write_text(text + "\n")


def measure(
    width: int, inner: int, experts: int, chosen: int, tokens: int, decodes: bool, rounds: int
) -> tuple[float, float, float]:
    """Milliseconds of the grouped and of the other form, and how many times the first is faster."""
    import numpy as np
    from mindspore import Tensor

    draw = np.random.default_rng(0)

    def normal(*shape: int) -> Tensor:
        return Tensor(draw.standard_normal(shape, dtype=np.float32) * np.float32(0.05))

    best = np.argsort(draw.random((tokens, experts)), 1)[:, :chosen].astype(np.int32)
    out_in = (inner, width), (inner, width), (width, inner)
    weights = [normal(experts, *(shape[::-1] if decodes else shape)) for shape in out_in]
    inputs = (normal(tokens, width), Tensor(best), normal(tokens, chosen), *weights)
    sides = [run_of(grouped, decodes) for grouped in (True, False)]
    seconds = [[side(inputs) for side in sides] for _ in range(rounds + 1)][1:]
    ours, theirs = (1000 * statistics.median(column) for column in zip(*seconds, strict=True))
    return ours, theirs, statistics.median(slow / fast for fast, slow in seconds)


def run_of(grouped: bool, decodes: bool):
    """A function of the inputs: seconds of one pass, of few tokens the mean of several."""
    from mindspore import grad, nn

    from mindrlhf.models import expert_kernels

    form = expert_kernels.expert_mlp if grouped else expert_kernels.composed_expert_mlp

    class Forward(nn.Cell):
        def construct(self, x, best, shares, gate, up, down):
            return form(x, best, shares, gate, up, down, 0, decodes)

    class Gradients(nn.Cell):
        def __init__(self):
            super().__init__()
            self.gradients = grad(Forward(), (0, 2, 3, 4, 5))

        def construct(self, *inputs):
            return self.gradients(*inputs)

    cell, times = (Forward(), 20) if decodes else (Gradients(), 1)

    def run(inputs) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            out = cell(*inputs)
        (out if decodes else out[0]).asnumpy()
        return (time.perf_counter() - begin) / times

    return run


if __name__ == "__main__":
    main()
