"""How the load of a decoder's experts is balanced while it trains, and what is told of it."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mindrlhf.config import BalanceConfig
from mindrlhf.errors import UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.experts import Experts, Router
from mindrlhf.utils.parallel import gather_objects


class Balancer:
    """The host's side of models.experts.Balance, of every layer with experts.

    A layer that no gradient passes through, below the ones that are trained, counts nothing and is not balanced.
    """

    def __init__(self, decoder: Decoder, coef: float, bias_rate: float):
        self.decoder, self.coef, self.bias_rate = decoder, coef, bias_rate
        self.routers = [layer.mlp.router for layer in decoder.layers if isinstance(layer.mlp, Experts)]
        for router in self.routers:
            router.is_balanced = True
        self.loads: list[np.ndarray] = []  # of the step, by layer: how often each expert was chosen

    @classmethod
    def of(cls, decoder: Decoder, config: BalanceConfig) -> "Balancer | None":
        """None for a decoder without experts. Raises UserError for settings that cannot have an effect."""
        model, where = decoder.config, "model.balance"
        for name, value in (("auxiliary_coef", config.auxiliary_coef or 0.0), ("bias_rate", config.bias_rate)):
            if value < 0:
                raise UserError(f"{where}.{name}: {value} must be 0 (off) or more")
            if value and not model.num_experts:
                raise UserError(f"{where}.{name}: {value}, but the model has no experts; remove it")
        if not model.num_experts:
            return None
        if config.bias_rate and model.router.score != "sigmoid":
            raise UserError(
                f"{where}.bias_rate: {config.bias_rate}, but the routers of model_type {model.model_type} have no "
                "bias; use auxiliary_coef"
            )
        if config.bias_rate and decoder.lora:
            raise UserError(f"{where}.bias_rate: {config.bias_rate}: adapters have no place for biases; set it to 0")
        coef = model.auxiliary_coef if config.auxiliary_coef is None else config.auxiliary_coef
        return cls(decoder, coef, config.bias_rate)

    @property
    def biases(self) -> list[Parameter]:
        """What `update` changes."""
        return [router.bias for router in self.routers] if self.bias_rate else []

    def start(self, batches: Iterable[NamedTuple], scale: float = 1.0) -> None:
        """batches: all micro-batches of the optimizer step, which have `segments`: each one's loss has its share of
        their tokens as its weight, so that with all of them the mean over the layers has the weight coef. scale: that
        the gradients are multiplied by."""
        tokens = sum(int(np.count_nonzero(batch.segments)) for batch in batches)
        weight = Tensor(scale * self.coef / (max(tokens, 1) * len(self.routers)), ms.float32)
        for router in self.routers:
            router.coef.set_data(weight)

    def finish(self, ranks: Sequence[int]) -> dict[str, float]:
        """The micro-batches are done: metrics, means over the layers. ranks: those with other micro-batches.

        busiest: load of the busiest expert over the mean load; unused: share of the experts that nothing was sent to;
        auxiliary_loss: models.experts.Balance, without its weight; entropy: of a token's probabilities, in nats.
        """
        tallies = [_take(router) for router in self.routers]
        tallies = [sum(parts) for parts in zip(*gather_objects(tallies, ranks), strict=True)]
        self.loads = [tally[:-3] for tally in tallies]
        layers = [
            (load.max() / load.mean(), (load == 0).mean(), loss / tokens, entropy / tokens)
            for load, (tokens, entropy, loss) in zip(self.loads, (tally[-3:] for tally in tallies), strict=True)
            if tokens
        ]
        means = np.mean(layers, 0) if layers else np.zeros(4)
        names = ("busiest", "unused", "auxiliary_loss", "entropy")
        return {f"experts/{name}": float(value) for name, value in zip(names, means, strict=True)}

    def update(self) -> None:
        """Of the biases, behind an optimizer step: up where the load was under the mean (arXiv 2408.15664)."""
        for bias, load in zip(self.biases, self.loads, strict=False):
            moved = bias.asnumpy() + np.float32(self.bias_rate) * np.sign(load.mean() - load).astype(np.float32)
            self.decoder.write(bias.name, (...,), moved)


def _take(router: Router) -> np.ndarray:
    """The tally, in float64, which begins anew."""
    taken = router.tally.asnumpy().astype(np.float64)
    router.tally.set_data(Tensor(np.zeros(taken.shape, np.float32)))
    return taken
