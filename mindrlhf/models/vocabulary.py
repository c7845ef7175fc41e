"""Log-probs from logits whose vocabulary is split over the tensor ranks, without bringing the logits together."""

import mindspore as ms
from mindspore import ops

from mindrlhf.models import cpu_kernels
from mindrlhf.models.collectives import Collective, Group

_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None


class SplitVocabulary(Collective):
    """Every rank says three numbers a target, in one exchange: the label's logit, 0 where the label is another rank's;
    the log of its total; the mean of its logits. The gradient needs no exchange.
    """

    def __init__(self, group: Group, first: int):
        """first: token id that this rank's part of the vocabulary begins with."""
        super().__init__(group)
        self.first = first

    def construct(self, logits, labels, temperature):
        """logits [N, V / T], labels [N] int32 of the whole vocabulary, temperature [] -> log-prob of the label under
        logits / temperature, entropy, log of the total: [N] float32 each, whole, on every rank."""
        labels = self._own_labels(labels, logits)
        if _has_own:
            logprob, entropy, log_total = _own.target_logprobs(logits, labels, temperature)
            logit, mean = logprob + log_total, log_total - entropy
        else:
            scaled = logits / temperature
            log_total = ops.logsumexp(scaled, -1)
            logit = ops.gather_elements(scaled, 1, ops.maximum(labels, 0).expand_dims(1)).reshape(-1)
            logit = logit * ops.cast(labels >= 0, ms.float32)
            mean = (ops.softmax(scaled, -1) * scaled).sum(-1)
        said = self.gathered(ops.stack((logit, log_total, mean)))  # [T, 3, N]
        log_totals = said[:, 1].transpose(1, 0)
        if _has_own:  # it sums exactly, and MindSpore's exp and log do not
            _, _, log_total = _own.target_logprobs(log_totals, labels * 0, temperature * 0.0 + 1.0)
        else:
            log_total = ops.logsumexp(log_totals, -1)
        shares = ops.expm1(said[:, 1] - log_total) + 1.0
        return said[:, 0].sum(0) - log_total, log_total - (shares * said[:, 2]).sum(0), log_total

    def bprop(self, logits, labels, temperature, out, dout):
        """The kernel's gradient with the whole vocabulary's entropy and total is the gradient of this part."""
        _, entropy, log_total = out
        own = self._own_labels(labels, logits)
        if _has_own:
            gradient = _own.target_logprobs_gradient(logits, own, temperature, entropy, log_total, dout[0], dout[1])
        else:
            logprobs = logits / temperature - log_total.expand_dims(1)
            of_logprob, of_entropy = dout[0].expand_dims(1), dout[1].expand_dims(1)
            gradient = -ops.exp(logprobs) * (of_logprob + of_entropy * (logprobs + entropy.expand_dims(1)))
            is_label = ops.equal(ops.arange(logits.shape[1]).expand_dims(0), own.expand_dims(1))
            gradient = (gradient + ops.cast(is_label, ms.float32) * of_logprob) / temperature
        return gradient, labels * 0, temperature * 0.0

    def _own_labels(self, labels, logits):
        """Counted from this rank's first token; -1 for another rank's."""
        here = labels - self.first
        inside = ops.logical_and(here >= 0, here < logits.shape[1])
        return ops.cast(inside, ms.int32) * (here + 1) - 1
