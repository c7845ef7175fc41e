"""Log-probs of labels where tensor ranks split the vocabulary, and where the logits are too many at a time."""

import mindspore as ms
from mindspore import nn, ops

from mindrlhf.models import cpu_kernels, kernels
from mindrlhf.models.collectives import Collective, Group

_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None
_matmul = ops.MatMul()
_matmul_nt = ops.MatMul(transpose_b=True)
_matmul_tn = ops.MatMul(transpose_a=True)


def label_logprobs(logits, labels, temperature):
    """logits [N, V], labels [N] int32, temperature [] -> log-prob of the label under logits / temperature, entropy, log
    of the total: [N] float32 each. A label of -1 is none: its logit counts as 0."""
    if _has_own:
        return _own.target_logprobs(logits, labels, temperature)
    scaled = logits / temperature
    log_total = ops.logsumexp(scaled, -1)
    logit = ops.gather_elements(scaled, 1, ops.maximum(labels, 0).expand_dims(1)).reshape(-1)
    logit = logit * ops.cast(labels >= 0, ms.float32)
    return logit - log_total, log_total - (ops.softmax(scaled, -1) * scaled).sum(-1), log_total


def label_logprobs_gradient(logits, labels, temperature, entropy, log_total, of_logprob, of_entropy):
    """The gradient [N, V] of logits. With the entropy and total of a whole vocabulary it is that of this part of it."""
    if _has_own:
        return _own.target_logprobs_gradient(logits, labels, temperature, entropy, log_total, of_logprob, of_entropy)
    logprobs = logits / temperature - log_total.expand_dims(1)
    of_logprob, of_entropy = of_logprob.expand_dims(1), of_entropy.expand_dims(1)
    gradient = -ops.exp(logprobs) * (of_logprob + of_entropy * (logprobs + entropy.expand_dims(1)))
    is_label = ops.equal(ops.arange(logits.shape[1]).expand_dims(0), labels.expand_dims(1))
    return (gradient + ops.cast(is_label, ms.float32) * of_logprob) / temperature


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
        logprob, entropy, log_total = label_logprobs(logits, self._own_labels(labels, logits), temperature)
        said = self.gathered(ops.stack((logprob + log_total, log_total, log_total - entropy)))  # [T, 3, N]
        log_totals = said[:, 1].transpose(1, 0)
        if _has_own:  # it sums exactly, and MindSpore's exp and log do not
            _, _, log_total = _own.target_logprobs(log_totals, labels * 0, temperature * 0.0 + 1.0)
        else:
            log_total = ops.logsumexp(log_totals, -1)
        shares = ops.expm1(said[:, 1] - log_total) + 1.0
        return said[:, 0].sum(0) - log_total, log_total - (shares * said[:, 2]).sum(0), log_total

    def bprop(self, logits, labels, temperature, out, dout):
        return self.gradient(logits, labels, temperature, out, dout), labels * 0, temperature * 0.0

    def gradient(self, logits, labels, temperature, out, dout):
        """Of logits [N, V / T], from what construct returned and its gradient."""
        _, entropy, log_total = out
        own = self._own_labels(labels, logits)
        return label_logprobs_gradient(logits, own, temperature, entropy, log_total, dout[0], dout[1])

    def _own_labels(self, labels, logits):
        """Counted from this rank's first token; -1 for another rank's."""
        here = labels - self.first
        inside = ops.logical_and(here >= 0, here < logits.shape[1])
        return ops.cast(inside, ms.int32) * (here + 1) - 1


class ChunkedLogprobs(nn.Cell):
    """Head and log-probs of few targets at a time, so that no [N, V] is ever there: the backward pass computes a
    chunk's logits once more. That is a fourth product to the head's three.

    The chunks wait for one another: MindSpore would else compute several at a time, and hold the logits of all of them.
    """

    def __init__(self, rows: int, split: SplitVocabulary | None, dtype: ms.Type):
        """rows: targets of a chunk. split: where ranks split the vocabulary. dtype: see kernels."""
        super().__init__(auto_prefix=False)
        self.rows, self.split, self.dtype = rows, split, dtype

    def construct(self, hidden, head, labels, temperature):
        """hidden [N, H], head [V, H] or this rank's part, labels [N] int32, temperature [] -> as label_logprobs."""
        rows, logprobs, entropies, totals, waiting = self.rows, (), (), (), hidden
        for first in range(0, hidden.shape[0], rows):
            logits = kernels.product(_matmul_nt, waiting[first : first + rows], head, self.dtype)
            own = labels[first : first + rows]
            if self.split is None:
                logprob, entropy, total = label_logprobs(logits, own, temperature)
            else:
                logprob, entropy, total = self.split(logits, own, temperature)
            logprobs, entropies, totals = logprobs + (logprob,), entropies + (entropy,), totals + (total,)
            waiting = ops.depend(hidden, logprob)
        return ops.concat(logprobs), ops.concat(entropies), ops.concat(totals)

    def bprop(self, hidden, head, labels, temperature, out, dout):
        rows, of_hidden, of_head, waiting = self.rows, (), None, hidden
        for first in range(0, hidden.shape[0], rows):
            x, own = waiting[first : first + rows], labels[first : first + rows]
            logits = kernels.product(_matmul_nt, x, head, self.dtype)
            entropy, total = out[1][first : first + rows], out[2][first : first + rows]
            of_logprob, of_entropy = dout[0][first : first + rows], dout[1][first : first + rows]
            if self.split is None:
                gradient = label_logprobs_gradient(logits, own, temperature, entropy, total, of_logprob, of_entropy)
            else:
                known = (total, entropy, total)  # of which the first is not read
                gradient = self.split.gradient(logits, own, temperature, known, (of_logprob, of_entropy))
            of_hidden = of_hidden + (kernels.product(_matmul, gradient, head, self.dtype),)
            share = kernels.product(_matmul_tn, gradient, x, self.dtype)
            of_head = share if of_head is None else of_head + share
            waiting = ops.depend(hidden, (of_hidden[-1], of_head))
        return ops.concat(of_hidden), of_head, labels * 0, temperature * 0.0
