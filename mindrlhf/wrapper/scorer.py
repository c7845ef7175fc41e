"""Log-probs of given answers under a decoder: for the reference policy, and inside every objective."""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindrlhf.losses import logprobs_and_entropy
from mindrlhf.models import cpu_kernels
from mindrlhf.models.collectives import Group
from mindrlhf.models.decoder import Decoder
from mindrlhf.types import PackedRows
from mindrlhf.utils.parallel import gather_objects
from mindrlhf.wrapper.graph import Graph

_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None


def target_logprobs(decoder, tokens, positions, segments, index, labels, temperature, entropy_gradient: bool):
    """Log-prob of labels [N] and entropy [N], float32, at the N target positions only: the head runs nowhere else."""
    hidden = decoder.targets(tokens, positions, segments, index)
    return hidden_logprobs(decoder, hidden, labels, temperature, entropy_gradient)


def hidden_logprobs(decoder, hidden, labels, temperature, entropy_gradient: bool):
    """The same from the hidden states [N, H] of the target positions; in chunks where N is large."""
    if decoder.is_chunked(hidden.shape[0]):
        own = decoder.copy(hidden), decoder.own_head()
        logprobs, entropy, _ = decoder.chunked(*own, labels, Tensor(temperature, ms.float32))
        return logprobs, entropy if entropy_gradient else ops.stop_gradient(entropy)
    logits = decoder.own_logits(hidden)
    if decoder.is_split:
        logprobs, entropy, _ = decoder.vocabulary(logits, labels, Tensor(temperature, ms.float32))
        return logprobs, entropy if entropy_gradient else ops.stop_gradient(entropy)
    if _has_own:
        logprobs, entropy, _ = _own.target_logprobs(logits, labels, Tensor(temperature, ms.float32))
        return logprobs, entropy if entropy_gradient else ops.stop_gradient(entropy)
    return logprobs_and_entropy(logits, labels, temperature, entropy_gradient=entropy_gradient)


class Scorer(Graph):
    """Log-probs [N] and entropy [N] of a micro-batch of packed rows."""

    def __init__(self, decoder: Decoder, temperature: float):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.temperature = temperature

    def construct(self, tokens, positions, segments, index, labels):
        return target_logprobs(self.decoder, tokens, positions, segments, index, labels, self.temperature, False)

    def score(self, batches: Sequence[PackedRows]) -> list[np.ndarray]:
        """Log-probs [N] float32 of each micro-batch; 0 on padding."""
        names = (*POSITION_FIELDS, "labels")
        return over(batches, names, lambda *inputs: self(*inputs)[0], self.decoder)


class ScoreHead(Graph):
    """A reward model's scores, or a critic's values, [N] at the target positions of a micro-batch of packed rows."""

    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, index):
        return self.decoder.scores(self.decoder.targets(tokens, positions, segments, index))

    def score(self, batches: Sequence[PackedRows]) -> list[np.ndarray]:
        """Scores [N] float32 of each micro-batch; 0 on padding."""
        return over(batches, POSITION_FIELDS, self, self.decoder)


POSITION_FIELDS = ("tokens", "positions", "segments", "index")


def over(
    batches: Sequence[PackedRows], names: Sequence[str], run: Callable[..., Tensor], decoder: Decoder
) -> list[np.ndarray]:
    """What `run` returns for those fields of each micro-batch, masked. Data ranks of the decoder share the batches."""
    data = Group.of(decoder.layout, "data")
    own = [
        run(*(Tensor(getattr(batch, name)) for name in names)).asnumpy() * batch.mask
        for batch in batches[data.index :: data.size]
    ]
    shares = gather_objects(own, data.ranks)
    return [shares[number % data.size][number // data.size] for number in range(len(batches))]
