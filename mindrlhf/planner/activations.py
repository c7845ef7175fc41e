"""What a pass over a micro-batch holds besides parameters: numbers a token, by what the graphs keep.

Derived in docs/planner.md from the kernels and their gradients: attention keeps no scores, a projection keeps its
input, a normalisation its input and output, SwiGLU its two inputs and its output.
"""

from functools import cache

from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import Architecture, Weight


def attention_numbers(model: Architecture, layout: Layout) -> float:
    """A token and layer: what the gradient of attention needs, queries, keys, values and output. Sequence ranks gather
    keys and values of whole rows."""
    heads = model.num_heads / layout.tensor
    latent = model.latent
    if latent:
        width = latent.nope + latent.rope
        narrow = 2 * latent.query_rank + 2 * latent.kv_rank + latent.rope
        return narrow + heads * (width + latent.value + (width + latent.value) * layout.sequence)
    keys = 2 * model.num_kv_heads * model.head_dim / layout.tensor
    return heads * (2 * model.head_dim + 1) + keys * layout.sequence


def gated_numbers(model: Architecture, layout: Layout, has_experts: bool) -> float:
    """A token and layer: gate, up and their product. With experts, for each that this rank computes for it: those and
    the output. Of experts that are chosen a token's are taken to be spread evenly, and each has its input by itself."""
    if not has_experts:
        return 3 * model.intermediate_size / layout.tensor
    inner = layout.tensor // layout.expert
    gated = model.hidden_size + 3 * model.expert_width / inner
    own = model.experts_per_token / layout.expert * (model.hidden_size + gated)
    return own + 3 * model.shared_width / layout.tensor + model.num_experts


def kept_numbers(model: Architecture, layout: Layout) -> float:
    """A token, all layers and the last norm: what the forward pass leaves for the backward pass."""
    residual = 4 * model.hidden_size  # the inputs and outputs of a layer's two norms
    attention = attention_numbers(model, layout)
    if model.family.sandwich_norms:  # the inputs of the two norms behind attention and MLP
        residual += 2 * model.hidden_size
    if model.family.qk_norm:  # and of those of queries and keys
        attention += (model.num_heads + model.num_kv_heads) * model.head_dim / layout.tensor
    dense = model.num_layers - model.expert_layers
    gated = dense * gated_numbers(model, layout, False)
    if model.expert_layers:
        gated += model.expert_layers * gated_numbers(model, layout, True)
    return model.num_layers * (residual + attention) + gated + 2 * model.hidden_size


def forward_numbers(model: Architecture, layout: Layout) -> float:
    """A token: the most that a forward pass without gradient holds at a time, in the larger half of a layer."""
    gated = gated_numbers(model, layout, False) if model.num_layers > model.expert_layers else 0
    if model.expert_layers:
        gated = max(gated, gated_numbers(model, layout, True))
    return 2 * model.hidden_size + max(gated, attention_numbers(model, layout))


def backward_numbers(model: Architecture, layout: Layout) -> float:
    """A token: what the backward pass of one layer's MLP adds: a gradient for each of its numbers and the residual."""
    return model.hidden_size + gated_numbers(model, layout, model.expert_layers > 0)


def head_bytes(model: Architecture, layout: Layout, targets: float, width: int, copies: int) -> float:
    """Of the head at the target positions: hidden states and float32 logits; copies: 2 with their gradient.

    A rank with a slice of the vocabulary has that slice of the logits."""
    if model.head == "score":
        return width * targets * model.hidden_size
    return targets * (width * model.hidden_size + 4 * copies * model.vocab_size / layout.tensor)


@cache
def layer_weights(model: Architecture) -> tuple[Weight, ...]:
    """Of all layers, without the embedding and what is behind the last layer."""
    return tuple(weight for weight in model.weights if ".layers." in weight.name)
