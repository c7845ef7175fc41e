"""A training step and some answers, as a job that keeps its graphs: python compile_job.py LAYERS CLIP. Prints JSON."""

import json
import sys
import time

import numpy as np

from mindrlhf.utils.parallel import start


def main(layers: int, clip: float) -> None:
    start()
    from mindrlhf.config import OptimizerConfig, SamplingConfig
    from mindrlhf.models.config import DecoderConfig
    from mindrlhf.models.decoder import Decoder, random_weights
    from mindrlhf.types import PolicyBatch, Prompt
    from mindrlhf.utils import compile_cache
    from mindrlhf.wrapper.generator import Generator
    from mindrlhf.wrapper.policy_objectives import PolicyLoss, PolicyObjective
    from mindrlhf.wrapper.train_step import TrainStep

    compile_cache.start("the same job")
    config = DecoderConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=16, max_positions=64, qkv_bias=True, tie_embeddings=True, model_type="qwen2",
    )  # fmt: skip
    decoder = Decoder(config, random_weights(config, 0))
    objective = PolicyObjective(decoder, PolicyLoss(eps_low=clip, eps_high=clip, kl_coef=0.1))
    step = TrainStep(objective, decoder.trainable(), OptimizerConfig())
    random = np.random.default_rng(0)
    tokens = random.integers(0, 320, (2, 32)).astype(np.int32)
    positions, segments = np.tile(np.arange(32, dtype=np.int32), (2, 1)), np.ones((2, 32), np.int32)
    index = np.arange(48, dtype=np.int32)
    numbers = random.standard_normal((4, 48)).astype(np.float32)
    batch = PolicyBatch(
        tokens, positions, segments, index, tokens.reshape(-1)[1:49], index * 0, np.ones(48, np.float32),
        np.abs(numbers[0]), numbers[1], numbers[2] - 6, numbers[3] - 6,
    )  # fmt: skip
    clock = time.perf_counter()
    results = [step([batch], 1e-2) for _ in range(2)]
    trained = time.perf_counter() - clock
    generator = Generator(decoder, slots=8, max_prompt_tokens=8, max_tokens=8)
    prompts = [Prompt(ids=row[:6], text="", label=None, key=key) for key, row in enumerate(tokens)]
    answers = generator.generate(prompts, 4, SamplingConfig(max_tokens=8), 0)
    report = {
        "numbers": [[one.loss, one.gradient_norm, one.metrics] for one in results]
        + [[float(answer.sampled_logprobs.sum()), answer.response_ids.tolist()] for answer in answers],
        "loaded": compile_cache.graphs_loaded(),
        "seconds": {"training": trained, "both": time.perf_counter() - clock},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
