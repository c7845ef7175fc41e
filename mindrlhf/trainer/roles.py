"""The models of a job, opened from checkpoints or built from nothing."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindrlhf.config import BuildConfig, ModelConfig
from mindrlhf.data.tokenizers import build_tokenizer, load_tokenizer, stop_ids
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.decoder import Decoder, Weights, random_weights
from mindrlhf.models.hf import Source, check_names, expected_shapes, read_generation_config, read_tensors
from mindrlhf.utils.checkpoint import write_model


@dataclass
class Policy:
    """A decoder with its tokenizer: what a Hugging Face checkpoint directory holds."""

    decoder: Decoder
    tokenizer: Any
    generation_config: dict[str, Any]

    def write(self, directory: Path, shard_bytes: float = 5e9) -> None:
        """As a Hugging Face checkpoint directory."""
        config = self.decoder.config
        write_model(directory, config, self.sources(), self.tokenizer, self.generation_config, shard_bytes)

    def stop_ids(self, stop: list[str]) -> tuple[int, ...]:
        """Tokens that end an answer: the checkpoint's own and the strings of a sampling config."""
        end = self.generation_config.get("eos_token_id")
        return stop_ids(self.tokenizer, [end] if isinstance(end, int) else end, stop)

    def sources(self) -> Iterator[Source]:
        for name, shape in expected_shapes(self.decoder.config).items():
            yield name, shape, lambda name=name: self.decoder.weights(name)


def checkpoint_weights(directory: Path, config: DecoderConfig) -> Weights:
    """The tensors of a checkpoint by name, all names and shapes checked first."""
    tensors = read_tensors(directory)
    check_names(config, tensors.shapes, directory)
    return tensors.__getitem__


def open_checkpoint(directory: str | Path, tokenizer: str = "") -> Policy:
    """A Hugging Face checkpoint directory; the tokenizer from another directory where one is given."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such checkpoint directory; download the model there or correct model.path")
    config = DecoderConfig.read(directory)
    loaded = load_tokenizer(tokenizer or directory)
    check_vocabulary(loaded, config, directory)
    decoder = Decoder(config, checkpoint_weights(directory, config))
    return Policy(decoder, loaded, read_generation_config(directory))


def open_policy(model: ModelConfig, seed: int) -> Policy:
    """The policy that a config names: `path`, or else `build`."""
    if model.path:
        return open_checkpoint(model.path, model.tokenizer)
    if not model.build.decoder:
        raise UserError("model: set model.path to a checkpoint directory, or model.build to make a new model")
    return build(model.build, seed)


def build(config: BuildConfig, seed: int) -> Policy:
    """Random weights and a tokenizer trained on the given files."""
    if not config.tokenizer_files:
        raise UserError("model.build.tokenizer_files: name at least one file of text for the tokenizer to learn from")
    with tempfile.TemporaryDirectory() as directory:
        build_tokenizer(config.tokenizer_files, config.vocab_size, directory, config.chat_template)
        tokenizer = load_tokenizer(directory)
    decoder_config = DecoderConfig.from_yaml(
        {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **config.decoder}, config.vocab_size
    )
    generation_config = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Policy(Decoder(decoder_config, random_weights(decoder_config, seed)), tokenizer, generation_config)


def check_vocabulary(tokenizer: Any, config: DecoderConfig, where: str | Path) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has token {largest}, but the model's vocab_size is {config.vocab_size}; "
            "they are of different models"
        )
