"""DPO steps side by side: ours (Packing, PreferenceObjective, TrainStep) against torch + transformers.

One step: 8 pairs that share prompts of 32 tokens, answers of 32 to 160; policy forward over both answers at once,
backward, gradient norm and clip, AdamW. The reference's log-probs are given, as after caching. Torch pads the batch to
its longest sequence, as TRL does by default; ours packs it, and packing is within the time.
"""

import time

from side_by_side import MODEL, PAIRS, PROMPT_TOKENS, TOKENS, arguments, compare, pair_lengths, policy, start_mindspore

STEPS = 2  # a round


def main() -> None:
    options = arguments(__doc__)
    start_mindspore(options.threads)
    import numpy as np

    from mindrlhf.config import OptimizerConfig, PreferenceLossConfig
    from mindrlhf.data.packing import Packing
    from mindrlhf.types import PairBatch
    from mindrlhf.wrapper.preference_objectives import PreferenceObjective
    from mindrlhf.wrapper.train_step import TrainStep

    decoder = policy()
    objective = PreferenceObjective(decoder, PreferenceLossConfig())
    step = TrainStep(objective, decoder.trainable(), OptimizerConfig())
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, MODEL["vocab_size"], PROMPT_TOKENS + n).astype(np.int32) for n in pair_lengths()]
    answers = [np.arange(len(one)) >= PROMPT_TOKENS for one in ids]

    def batches() -> list[PairBatch]:
        packing = Packing.of(ids, answers, rows=PAIRS, row_tokens=2 * TOKENS, together=2)
        zeros, weights = packing.by_sequence([0.0] * len(ids)), packing.by_sequence([1 / PAIRS] * len(ids))
        rows = zip(packing.batches, weights, zeros, strict=True)
        return [PairBatch(*packed, weight=weight, margin=zero, ref_logprobs=zero) for packed, weight, zero in rows]

    def run() -> dict[str, list[float]]:
        taken = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step(batches(), 1e-4)
            taken.append(time.perf_counter() - start)
        return {"dpo_step": taken}

    compare(run, "preference", options)


if __name__ == "__main__":
    main()
