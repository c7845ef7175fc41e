"""Training steps side by side: ours (TrainStep, SupervisedObjective) against torch + transformers.

One step: forward, backward with a loss at all positions, gradient norm and clip, AdamW; 16 rows of 192 tokens.
"""

import time

from side_by_side import BATCH, MODEL, TOKENS, arguments, compare, policy, start_mindspore

STEPS = 2  # a round


def main() -> None:
    options = arguments(__doc__)
    start_mindspore(options.threads)
    import numpy as np

    from mindrlhf.config import OptimizerConfig
    from mindrlhf.types import SupervisedBatch
    from mindrlhf.wrapper.objectives import SupervisedObjective
    from mindrlhf.wrapper.train_step import TrainStep

    decoder = policy()
    step = TrainStep(SupervisedObjective(decoder), decoder.trainable_params(), OptimizerConfig())
    shape, targets = (BATCH, TOKENS), BATCH * TOKENS
    draw = np.random.default_rng(0)
    batch = SupervisedBatch(
        tokens=draw.integers(0, MODEL["vocab_size"], shape).astype(np.int32),
        positions=np.tile(np.arange(TOKENS, dtype=np.int32), (BATCH, 1)),
        segments=np.ones(shape, np.int32),
        index=np.arange(targets, dtype=np.int32),
        labels=draw.integers(0, MODEL["vocab_size"], targets).astype(np.int32),
        sequence=np.repeat(np.arange(BATCH, dtype=np.int32), TOKENS),
        mask=np.ones(targets, np.float32),
        loss_weight=np.full(targets, 1 / targets, np.float32),
    )

    def run() -> dict[str, list[float]]:
        taken = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step([batch], 1e-4)
            taken.append(time.perf_counter() - start)
        return {"training_step": taken}

    compare(run, "training", options)


if __name__ == "__main__":
    main()
