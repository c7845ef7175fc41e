"""A model's directory: a Hugging Face checkpoint, or a PEFT adapter with the checkpoint that it names."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.data.tokenizers import has_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import from_stored
from mindrlhf.models.hf import check_names, read_generation_config, read_tensors
from mindrlhf.models.lora import merged
from mindrlhf.models.peft import SavedAdapter, base_directory, is_adapter, read_adapter
from mindrlhf.models.shapes import SCORE, Weights, expected_shapes


@dataclass(frozen=True)
class ModelDirectory:
    """Headers are read and checked; a weight is read from disk when it is asked for."""

    path: Path
    base: Path  # the checkpoint; path itself where there is no adapter
    config: DecoderConfig
    weights: Weights  # of the base, and the score head
    adapter: SavedAdapter | None = None

    @classmethod
    def read(cls, path: str | Path, base: str = "") -> "ModelDirectory":
        """base: where an adapter's checkpoint lies, instead of what the adapter says. Raises UserError."""
        path = Path(path)
        if not path.is_dir():
            fix = "run the job whose output it is, download it there, or correct the path"
            raise UserError(f"{path}: no such checkpoint directory; {fix}")
        checkpoint = base_directory(path, base) if is_adapter(path) else path
        config = DecoderConfig.read(checkpoint)
        found = cls(path, checkpoint, config, tensors_of(checkpoint, config))
        if not is_adapter(path):
            return found
        adapter = read_adapter(path, config)
        if SCORE in adapter.tensors:
            found = found.with_head("score").with_score(adapter.tensors[SCORE])
        return replace(found, adapter=adapter)

    def with_head(self, head: str) -> "ModelDirectory":
        """The same trunk under another head; a new score head is 0. Raises UserError where lm_head.weight is lost."""
        if head == self.config.head:
            return self
        if head == "logits":
            raise UserError(f"{self.path}: a reward model, which has no lm_head.weight; give a language model")
        config = replace(self.config, head=head)
        return replace(self, config=config).with_score(np.zeros(expected_shapes(config)[SCORE], np.float32))

    def with_score(self, score: np.ndarray) -> "ModelDirectory":
        """With this score.weight, and the statistics of the scores that a config.json beside an adapter holds."""
        config, weights = self.config, self.weights
        if self.path != self.base and (self.path / "config.json").is_file():
            own = DecoderConfig.read(self.path)
            config = replace(config, score_mean=own.score_mean, score_std=own.score_std)
        return replace(self, config=config, weights=lambda name: score if name == SCORE else weights(name))

    def merged(self) -> Weights:
        """The weights with the adapter, if there is one, added to them."""
        return merged(self.weights, self.adapter.lora.scale, self.adapter.tensors) if self.adapter else self.weights

    @property
    def tokenizer(self) -> Path:
        """The directory with the tokenizer: an adapter may bring its own."""
        return self.path if has_tokenizer(self.path) else self.base

    def generation_config(self) -> dict[str, Any]:
        return read_generation_config(self.path) or read_generation_config(self.base)


def tensors_of(directory: Path, config: DecoderConfig) -> Weights:
    """The tensors of a checkpoint by the decoder's names, all names and shapes checked first. Raises UserError."""
    tensors = read_tensors(directory).named_as_whole(config)
    check_names(config, tensors.shapes, directory)
    return from_stored(config, tensors.__getitem__)
