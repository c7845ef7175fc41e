"""Decoding side by side: ours (Generator) against torch + transformers (Qwen2ForCausalLM with its KV cache).

decode_step: one token for each of 16 slots, sampling and the host's bookkeeping included, the context growing from 32
to 192. generate_token: a whole call, prefill included, over the tokens an answer; torch's is model.generate.
"""

import time

from side_by_side import BATCH, MODEL, PROMPT_TOKENS, TOKENS, arguments, compare, policy, start_mindspore


def main() -> None:
    options = arguments(__doc__)
    start_mindspore(options.threads)
    import numpy as np

    from mindrlhf.config import SamplingConfig
    from mindrlhf.types import Prompt
    from mindrlhf.wrapper import answering, generator

    steps = TOKENS - PROMPT_TOKENS
    ours = generator.Generator(policy(), slots=BATCH, max_prompt_tokens=PROMPT_TOKENS, max_tokens=steps)
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, MODEL["vocab_size"], PROMPT_TOKENS).astype(np.int32) for _ in range(BATCH)]
    prompts = [Prompt(ids=row, text="", label=None, key=key) for key, row in enumerate(ids)]
    step, taken = answering.Call._step, []

    def timed_step(call) -> None:
        start = time.perf_counter()
        step(call)
        taken.append(time.perf_counter() - start)

    answering.Call._step = timed_step

    def run() -> dict[str, list[float]]:
        taken.clear()
        start = time.perf_counter()
        ours.generate(prompts, 1, SamplingConfig(max_tokens=steps), 0)
        whole = time.perf_counter() - start
        return {"decode_step": list(taken), "generate_token": [whole / steps]}

    compare(run, "decode", options)


if __name__ == "__main__":
    main()
