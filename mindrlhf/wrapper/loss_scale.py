"""Dynamic loss scale: float16 has no number under 6e-8, and most gradients are smaller (arXiv 1710.03740)."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindrlhf.models.decoder import Decoder

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24


class LossScale:
    """What the loss is multiplied by before the backward pass, and gradients are divided by behind it.

    A power of two, so that scaling rounds nothing. Halved where a gradient overflows, and doubled after `patience`
    steps without that.
    """

    def __init__(self, first: float = FIRST, patience: int = 2000):
        self.patience, self.good = patience, 0
        # A parameter: compiled cells see another value without recompiling.
        self.parameter = Parameter(Tensor(first, ms.float32), name="loss_scale", requires_grad=False)

    @classmethod
    def of(cls, decoder: Decoder) -> "LossScale | None":
        """None where nothing is multiplied in float16: bfloat16 has the range of float32."""
        return cls() if decoder.config.compute.dtype == "float16" else None

    @property
    def value(self) -> float:
        return float(self.parameter.asnumpy())

    def halve(self) -> bool:
        """Behind gradients that are not finite: whether a smaller scale may help."""
        self.good, before = 0, self.value
        self._set(before / 2)
        return before > LEAST

    def count(self) -> None:
        """Behind an optimizer step."""
        self.good += 1
        if self.good == self.patience:
            self._set(self.value * 2)
            self.good = 0

    def _set(self, value: float) -> None:
        self.parameter.set_data(Tensor(min(max(value, LEAST), MOST), ms.float32))

    def state(self) -> np.ndarray:
        return np.array([self.value, self.good], np.float32)

    def load_state(self, state: np.ndarray) -> None:
        self._set(float(state[0]))
        self.good = int(state[1])


class Scaled(nn.Cell):
    """An objective whose loss is multiplied by a number or a parameter."""

    def __init__(self, objective: nn.Cell, factor: float | Parameter):
        super().__init__(auto_prefix=False)
        self.objective, self.factor = objective, factor

    def construct(self, *batch):
        loss, metrics = self.objective(*batch)
        return loss * self.factor, metrics
