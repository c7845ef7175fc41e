"""Models that a published program describes by MindFormers' configurations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.models.decoder import Decoder, random_weights
from mindrlhf.models.mindformers_config import decoder_config, difference
from mindrlhf.models.model_directory import ModelDirectory
from mindrlhf.trainer.roles import Policy, check_vocabulary, checkpoint_weights
from mindrlhf.wrapper.scorer import Scorer


class PromptBatches:
    """The prompts as the published programs count them."""

    def __init__(self, size: int, batch_size: int):
        self._size, self._batch_size = size, batch_size

    def get_dataset_size(self) -> int:
        """Prompts in the training set."""
        return self._size

    def get_batch_size(self) -> int:
        """Prompts a step."""
        return self._batch_size


def checkpoint_of(config: Any) -> Path | None:
    """The Hugging Face directory that a model configuration names, if it names one."""
    name = getattr(config, "checkpoint_name_or_path", None)
    return Path(name) if name else None


def described_policy(
    model_config: Any, tokenizer: Any, seed: int, name: str, layout: Layout, head: str = "logits"
) -> Policy:
    """The checkpoint that checkpoint_name_or_path names, or random weights where it names none. Raises UserError."""
    config = replace(decoder_config(model_config, name), head=head)
    check_vocabulary(tokenizer, config, name)
    checkpoint = checkpoint_of(model_config)
    if checkpoint and head == "score":
        found = ModelDirectory.read(checkpoint).with_head(head)
        weights = found.merged()
        config = replace(config, score_mean=found.config.score_mean, score_std=found.config.score_std)
    else:
        weights = checkpoint_weights(checkpoint, config) if checkpoint else random_weights(config, seed)
    # LlamaConfig's default, 2, is Llama's end and an ordinary token elsewhere: only special tokens end an answer.
    ends = [tokenizer.eos_token_id, *(n for n in config.eos_token_ids if n in tokenizer.all_special_ids)]
    layout.check(config, name)
    decoder = Decoder(config, weights, layout=layout)
    return Policy(decoder, tokenizer, {"eos_token_id": list(dict.fromkeys(ends))})


def check_same(name: str, model_config: Any, other_name: str, other: Any) -> None:
    """Raises UserError where two arguments of those names describe different models."""
    ours = decoder_config(model_config, name)
    theirs = decoder_config(other, other_name)
    field = difference(ours, theirs)
    if field:
        raise UserError(
            f"{other_name}: {field} is {getattr(theirs, field)}, but {getattr(ours, field)} in {name}; "
            "they must describe the same model"
        )


def described_reference(ref_model_config: Any, policy: Policy, temperature: float) -> Scorer | None:
    """Of the checkpoint that the reference's configuration names; None: it is the policy as training begins."""
    config, checkpoint = policy.decoder.config, checkpoint_of(ref_model_config)
    if not checkpoint:
        return None
    return Scorer(Decoder(config, checkpoint_weights(checkpoint, config), layout=policy.decoder.layout), temperature)


def refuse_without_model(trainer: str, model: str, **given: Any) -> None:
    """Raises UserError for arguments that only mean something beside the policy's configuration, `model`."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UserError(
            f"{trainer}: {model} is needed beside {', '.join(names)}; or leave them all out, and set model.path in the "
            "config"
        )
