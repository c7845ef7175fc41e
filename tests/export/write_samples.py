"""Tiny models as this package writes them, and what it computes with them, for check_samples.py.

    python tests/export/write_samples.py DIR && TORCH_PYTHON tests/export/check_samples.py DIR

Each model is a directory in DIR; expected.npz beside them holds ids [2, T] int32, and an array a model under its name.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from mindrlhf.utils.parallel import start  # noqa: E402

DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def main(directory: Path) -> None:
    start()
    directory.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, 260, (2, 12)).astype(np.int32)
    arrays = {"ids": ids}
    for family in ("llama", "qwen2"):
        policy = tiny(family, "score")
        policy.write(directory / f"{family}_score")
        arrays[f"{family}_score"] = scores(policy.decoder, ids)
        tiny(family, "logits").write(directory / f"{family}_base")
        for head, numbers in (("logits", logits), ("score", scores)):
            policy = adapted(directory / f"{family}_base", head)
            policy.write(directory / f"{family}_{head}_adapter")
            arrays[f"{family}_{head}_adapter"] = numbers(policy.decoder, ids)
    np.savez(directory / "expected.npz", **arrays)


def tiny(family: str, head: str):
    """A policy with random weights, those of the score head among them."""
    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    policy = build(BuildConfig({"model_type": family, **DECODER}, 270, [__file__]), seed=1, head=head)
    if head == "score":
        random = np.random.default_rng(2).standard_normal((1, 32)).astype(np.float32)
        weights = policy.decoder.weights
        policy.decoder.load(lambda name: random if name == "score.weight" else weights(name))
        policy.decoder.config = replace(policy.decoder.config, score_mean=0.25, score_std=3.0)
    return policy


def adapted(base: Path, head: str):
    """A policy with adapters on the base, their B random: on every projection, or on one of one layer."""
    from mindrlhf.config import LoraConfig, ModelConfig
    from mindrlhf.trainer.roles import open_policy

    lora = LoraConfig(3, 4.0, 0.1, ["all-linear"]) if head == "logits" else LoraConfig(2, 3.5, 0, ["v_proj"], [1])
    policy = open_policy(ModelConfig(path=str(base), lora=lora), 1, head)
    random = np.random.default_rng(3)
    values = {name: 0.3 * random.standard_normal(array.shape) for name, array in policy.decoder.adapter_tensors()}
    policy.decoder.load_adapter(values.__getitem__)
    return policy


def rows(ids: np.ndarray) -> list:
    """One sequence a row."""
    from mindspore import Tensor

    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape).copy()
    return [Tensor(array) for array in (ids, positions, np.ones_like(ids))]


def logits(decoder, ids: np.ndarray) -> np.ndarray:
    """[2, T, V]."""
    return decoder.logits(decoder(*rows(ids))).asnumpy().reshape(*ids.shape, -1)


def scores(decoder, ids: np.ndarray) -> np.ndarray:
    """[2], at the last tokens."""
    hidden = decoder(*rows(ids)).reshape(*ids.shape, -1)
    return decoder.scores(hidden[:, -1]).asnumpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
