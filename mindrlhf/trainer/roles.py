"""The models of a job, opened from checkpoints or built from nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindspore import Parameter

from mindrlhf.config import BuildConfig, LoraConfig, ModelConfig
from mindrlhf.data.tokenizers import load_tokenizer, stop_ids, train_tokenizer
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS, Layout
from mindrlhf.models.compute import Compute
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import Source, stored_shapes, to_stored
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.models.hf import check_names, read_generation_config
from mindrlhf.models.lora import Lora, check_layers, random_adapter
from mindrlhf.models.mindformers_backbone import OURS, Network, network_of
from mindrlhf.models.model_directory import ModelDirectory, tensors_of
from mindrlhf.models.peft import is_adapter, read_adapter, write_adapter
from mindrlhf.models.resizing import with_tokens
from mindrlhf.models.shapes import Weights
from mindrlhf.utils.checkpoint import write_json, write_model, write_tokenizer


@dataclass
class Policy:
    """A decoder with its tokenizer: what a Hugging Face checkpoint directory holds, or a PEFT adapter's."""

    decoder: Decoder
    tokenizer: Any
    generation_config: dict[str, Any]
    train_layers: Sequence[int] = ()  # empty: all
    base: str = ""  # the checkpoint directory that adapters belong to

    @property
    def trainable(self) -> list[Parameter]:
        return self.decoder.trainable(self.train_layers)

    def write(self, directory: Path, shard_bytes: float = 5e9) -> None:
        """As a Hugging Face checkpoint directory, or as a PEFT adapter where the decoder has adapters."""
        decoder, config = self.decoder, self.decoder.config
        if not decoder.lora:
            write_model(directory, config, self.sources(), self.tokenizer, self.generation_config, shard_bytes)
            return
        score = config.head == "score"
        write_adapter(directory, decoder.lora, self.base, decoder.adapter_tensors(), score)
        if score:  # PEFT's file has no place for the statistics of the scores
            write_json(directory / "config.json", config.to_hf())
        write_json(directory / "generation_config.json", self.generation_config)
        write_tokenizer(directory, self.tokenizer)

    def load(self, directory: Path) -> None:
        """What `write` wrote: the weights, in place, and the tokens that end an answer. Raises UserError."""
        decoder = self.decoder
        self.generation_config = read_generation_config(directory) or self.generation_config
        if decoder.lora:
            decoder.load_adapter(read_adapter(directory, decoder.config).tensors.__getitem__)
        else:
            decoder.load(checkpoint_weights(directory, decoder.config))

    def stop_ids(self, stop: list[str]) -> tuple[int, ...]:
        """Tokens that end an answer: the checkpoint's own and the strings of a sampling config."""
        return stop_ids(self.tokenizer, self._ends(), stop)

    def add_stop_ids(self, ids: Sequence[int]) -> None:
        """More tokens that end an answer, for whoever generates with what is written."""
        self.generation_config["eos_token_id"] = list(dict.fromkeys([*self._ends(), *ids]))

    def _ends(self) -> list[int]:
        end = self.generation_config.get("eos_token_id")
        return [end] if isinstance(end, int) else end or []

    def sources(self) -> Iterator[Source]:
        """The weights under their names in a checkpoint of the family."""
        yield from to_stored(self.decoder.config, self.decoder.weights, self.decoder.expert)


def checkpoint_weights(directory: Path, config: DecoderConfig) -> Weights:
    """The weights in a checkpoint's or an adapter's directory for a decoder of that config, adapters merged.

    All names and shapes are checked first. Raises UserError.
    """
    if not is_adapter(directory):
        return tensors_of(directory, config)
    found = ModelDirectory.read(directory).with_head(config.head)
    check_names(config, stored_shapes(found.config), directory)
    return found.merged()


def open_checkpoint(
    directory: str | Path,
    tokenizer: str = "",
    head: str | None = None,
    lora: LoraConfig | None = None,
    seed: int = 0,
    layout: Layout = ONE_PROCESS,
    add_tokens: Sequence[str] = (),
    make: Callable[..., Decoder] = Decoder,
) -> Policy:
    """A checkpoint's or an adapter's directory; the tokenizer from another directory where one is given.

    head: "logits", "score", or None for what the checkpoint has. A language model can be given a score head, of
    zeros; a reward model has lost its logits. lora: new adapters where its rank is over 0, their first values from
    seed; an adapter's directory brings its own, ready to be trained on. layout: how processes share the model.
    add_tokens: special tokens to add. make: instead of Decoder. Raises UserError.
    """
    found = ModelDirectory.read(directory)
    loaded = load_tokenizer(tokenizer or found.tokenizer)
    check_vocabulary(loaded, found.config, directory)
    found = found.with_head(head or found.config.head)
    config, weights, saved = found.config, found.weights, found.adapter
    if add_tokens:
        if saved or (lora and lora.rank):
            raise UserError("model.add_tokens: adapters have no rows for new tokens; remove it or train without LoRA")
        config, weights = with_tokens(loaded, config, weights, add_tokens)
    if saved:
        if lora and lora != LoraConfig():
            raise UserError(
                f"model.lora: {directory} holds an adapter of rank {saved.lora.rank} with its own settings; remove the "
                "section to go on with that, or merge it first (mindrlhf merge-lora)"
            )
        settings, adapter = saved.lora, saved.tensors.__getitem__
    else:
        settings = Lora.of(lora, config) if lora else None
        adapter = random_adapter(settings, config, seed) if settings else None
    layout.check(config, "parallel")
    decoder = make(config, weights, lora=settings, adapter=adapter, layout=layout)
    return Policy(decoder, loaded, found.generation_config(), base=str(found.base.resolve()))


def open_policy(model: ModelConfig, seed: int, head: str = "logits", layout: Layout = ONE_PROCESS) -> Policy:
    """The policy that a config names: `path`, or else `build`; with adapters or chosen layers where it asks for them.

    layout: how processes share it. Raises UserError.
    """
    network, compute = network_of(model), Compute(model.compute_dtype, model.recompute, model.logits_at_once)
    compute.check()
    network = network._replace(make=compute.applied_to(network.make))
    if model.path:
        more = (model.add_tokens, network.make)
        policy = open_checkpoint(model.path, model.tokenizer, head, model.lora, seed, layout, *more)
    elif model.lora.rank:
        raise UserError("model.lora: needs model.path: an adapter names the checkpoint it belongs to; save one first")
    elif not (model.build.decoder or network.config):
        raise UserError("model: set model.path to a checkpoint directory, or model.build to make a new model")
    else:
        policy = build(model.build, seed, head, layout, model.add_tokens, network, model.tokenizer)
    if model.train_layers and policy.decoder.lora:
        raise UserError("model.train_layers: with adapters no layers are trained; remove it and set model.lora.layers")
    check_layers(model.train_layers, policy.decoder.config, "model.train_layers")
    policy.train_layers = model.train_layers
    return policy


def build(
    config: BuildConfig,
    seed: int,
    head: str = "logits",
    layout: Layout = ONE_PROCESS,
    add_tokens: Sequence[str] = (),
    network: Network = OURS,
    tokenizer_directory: str = "",
) -> Policy:
    """Random weights, and a tokenizer trained on the given files or from a directory, with those special tokens added.

    network: its configuration, where it has one, stands for config.decoder. Raises UserError.
    """
    tokenizer = load_tokenizer(tokenizer_directory) if tokenizer_directory else train_tokenizer(config)
    if network.config and config.decoder:
        raise UserError("model.build.decoder: model.mindformers describes the model too; remove one of them")
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    if network.config:
        decoder_config = replace(network.config, **ends)
        check_vocabulary(tokenizer, decoder_config, "model.mindformers")
    else:
        decoder_config = DecoderConfig.from_yaml({**ends, **config.decoder}, config.vocab_size)
    decoder_config = replace(decoder_config, head=head)
    generation_config = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    weights = random_weights(decoder_config, seed)
    if add_tokens:
        decoder_config, weights = with_tokens(tokenizer, decoder_config, weights, add_tokens)
    layout.check(decoder_config, "parallel")
    decoder = network.make(decoder_config, weights, layout=layout)
    return Policy(decoder, tokenizer, generation_config)


def check_same_tokens(ours: Any, theirs: Any, where: str) -> None:
    """Raises UserError where two tokenizers mean different tokens by one id. Either may have more of them."""
    known = {number: token for token, number in ours.get_vocab().items()}
    for token, number in theirs.get_vocab().items():
        if known.get(number, token) != token:
            raise UserError(
                f"{where}: token {number} is {token!r} there and {known[number]!r} for the policy; take a model "
                "with the policy's tokenizer"
            )


def check_vocabulary(tokenizer: Any, config: DecoderConfig, where: str | Path) -> None:
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has token {largest}, but the model's vocab_size is {config.vocab_size}; "
            "they are of different models"
        )
