"""How a decoder is computed, beside what it computes: the precision of its products, and what is computed twice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from mindrlhf.errors import UserError
from mindrlhf.utils.parallel import device_target


class Compute(NamedTuple):
    """Parameters are float32 in any case."""

    dtype: str = "float32"  # that matrices are multiplied in: float32, bfloat16 or float16
    recompute: bool = False  # layers once more in the backward pass, instead of keeping what is inside
    logits_at_once: int = 2**25  # of the head and the loss, tokens x vocabulary; 0: all

    def check(self) -> None:
        """Raises UserError for a precision that the device cannot multiply in."""
        if self.dtype == "bfloat16" and device_target() == "CPU":
            raise UserError(
                "model.compute_dtype: MindSpore multiplies no bfloat16 matrices on a CPU; take float32 or float16, or "
                "set MINDRLHF_DEVICE=Ascend"
            )
        if self.logits_at_once < 0:
            raise UserError(f"model.logits_at_once: {self.logits_at_once} is negative; 0 is all at once")

    def targets_at_once(self, vocabulary: int) -> int:
        """Whose logits are computed at a time; 0: all."""
        return max(self.logits_at_once // vocabulary, 1) if self.logits_at_once else 0

    def applied_to(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """`make`, whose first argument is a DecoderConfig, of decoders that are computed in this way."""
        return lambda config, *rest, **more: make(replace(config, compute=self), *rest, **more)
