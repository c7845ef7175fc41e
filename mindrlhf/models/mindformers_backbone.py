"""A policy of MindFormers' own cells: embedding, layers, norm and head of its legacy LlamaForCausalLM, unmodified.

Only the loop over the layers is ours, because that class's own takes neither positions that start anew within a row
nor, where there is no fused attention, a mask. Source: MindFormers 1.9, `models/llama`.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import nn, ops

from mindrlhf.config import ModelConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS
from mindrlhf.models import kernels
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.layers import Make, parameter_of
from mindrlhf.models.mindformers_config import difference, read_mindformers
from mindrlhf.models.mindformers_kinds import KINDS
from mindrlhf.models.mindformers_names import from_mindformers
from mindrlhf.models.shapes import SCORE, Weights

# What a YAML may say of the kernels, and what a CPU has.
_KERNELS = {"use_flash_attention": False, "fused_rms_norm": False, "use_rope_slice": True}
_PRECISE = ("layernorm_compute_type", "softmax_compute_type", "rotary_dtype", "residual_dtype", "param_init_type")


class Network(NamedTuple):
    """What a model section says of the network itself."""

    make: Callable[..., Decoder] = Decoder  # takes a DecoderConfig, weights, and Decoder's further arguments by name
    config: DecoderConfig | None = None  # that of model.mindformers


OURS = Network()


def network_of(model: ModelConfig) -> Network:
    """model.backbone and model.mindformers. Raises UserError; so does `make`, for another model than described."""
    if not model.mindformers:
        if model.backbone != "decoder":
            raise UserError("model.backbone: mindformers needs model.mindformers, the YAML of its network")
        return OURS
    found = read_mindformers(model.mindformers)
    cell: Callable[..., Decoder] = Decoder
    if model.backbone == "mindformers":
        if found.kind != "LlamaConfig" or not found.is_legacy:
            shown = found.kind if found.is_legacy else f"{found.kind} with use_legacy false"
            raise UserError(
                f"model.backbone: {model.mindformers} has {shown}; of MindFormers' networks only LlamaConfig's "
                "legacy one is built, set it to decoder"
            )
        cell = partial(MindFormersDecoder, found.values)

    def make(config: DecoderConfig, weights: Weights, **rest: Any) -> Decoder:
        described = replace(found.config, vocab_size=config.vocab_size) if model.add_tokens else found.config
        field = difference(described, config)
        if field:
            there, here = getattr(described, field), getattr(config, field)
            checkpoint = model.path or "the model"
            raise UserError(
                f"model.mindformers: {field} is {there} in {model.mindformers} and {here} in {checkpoint}; remove "
                "model.mindformers, or name the YAML of this checkpoint"
            )
        return cell(config, weights, **rest)

    return Network(make, found.config)


class MindFormersDecoder(Decoder):
    """A Decoder for training and scoring, of another network: the same tensors under the same names.

    values: the model_config of a MindFormers YAML that describes config. A generator has a decoder of its own, which is
    given the weights by name.
    """

    def __init__(self, values: dict[str, Any], config: DecoderConfig, weights: Weights, **rest: Any):
        """rest: Decoder's further arguments. Raises UserError for what this network cannot."""
        if rest.get("lora"):
            raise UserError("model.lora: MindFormers' network has no adapters; set model.backbone to decoder")
        for name in ("tensor", "sequence"):
            if getattr(rest.get("layout", ONE_PROCESS), name) > 1:
                raise UserError(f"parallel.{name}: MindFormers' network is not split; set it to 1")
        self.values = values
        super().__init__(config, weights, **rest)
        self.load(weights)

    def _make_cells(self, make: Make) -> None:
        network = llama_network(self.values, self.config)
        self.model = network.model
        self.flash = self.model.use_flash_attention
        if self.config.compute.recompute:
            for layer in self.model.layers:
                layer.recompute()
        for parameter in network.get_parameters():
            parameter.name = from_mindformers(parameter.name)  # an optimizer's and a checkpoint's tensors are by it
        self.embedding = self.model.tok_embeddings.embedding_weight
        if self.config.head == "score":
            self.score = parameter_of(make.weights(SCORE), SCORE)
        elif not self.tied:
            self.head = network.lm_head.weight

    def construct(self, tokens, positions, segments):
        """tokens, positions, segments [B, T] int32 -> normalised hidden states float32 [B*T, H]."""
        rows, length = tokens.shape
        mask = kernels.visible(positions, segments)  # added to the scores
        if self.flash:
            mask = ops.cast(mask != 0, ms.uint8)  # 1 where a token is not seen
        cos, sin, swap = self.model.freqs_mgr.increment_multi_ids(positions)
        by_row = (rows, 1, length, -1)
        rope = cos.reshape(by_row), sin.reshape(by_row), swap
        x = self.model.tok_embeddings(tokens)
        for layer in self.model.layers:
            x = layer(x, rope, mask)
        return ops.cast(self.model.norm_out(x), ms.float32).reshape(rows * length, -1)


def llama_network(values: dict[str, Any], config: DecoderConfig) -> nn.Cell:
    """MindFormers' LlamaForCausalLM with random weights. Of values, its model_config, the model and the kernels."""
    settings = {key: values[key] for key in (*KINDS["LlamaConfig"].keys, *_KERNELS) if key in values}
    # seq_length would be the side of a matrix, a mask that is not used.
    settings |= {"vocab_size": config.vocab_size, "max_position_embedding": config.max_positions, "seq_length": 1}
    settings |= {**dict.fromkeys(_PRECISE, "float32"), "compute_dtype": config.compute.dtype}
    if ms.get_context("device_target") == "CPU":
        settings |= _KERNELS
    logging.disable(logging.WARNING)  # it tells each step, and what it could not import
    try:
        from mindformers.models.llama.llama import LlamaForCausalLM  # takes seconds
        from mindformers.models.llama.llama_config import LlamaConfig

        return LlamaForCausalLM(LlamaConfig(**settings))
    finally:
        logging.disable(logging.NOTSET)
