"""Cells that tests compile; compiled code must live in a file."""

from mindspore import nn, ops

from mindrlhf.wrapper.policy_objectives import ValueHead
from mindrlhf.wrapper.scorer import hidden_logprobs, target_logprobs


class Logits(nn.Cell):
    def __init__(self, decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments):
        return self.decoder.logits(self.decoder(tokens, positions, segments))


class NextTokenLoss(nn.Cell):
    """Mean cross-entropy at the given positions."""

    def __init__(self, decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, index, labels):
        logprobs, _ = target_logprobs(self.decoder, tokens, positions, segments, index, labels, 1.0, False)
        return ops.neg(logprobs.mean())


class NextTokenLossAndMetrics(NextTokenLoss):
    """What a TrainStep takes."""

    def construct(self, tokens, positions, segments, index, labels):
        logprobs, _ = target_logprobs(self.decoder, tokens, positions, segments, index, labels, 1.0, False)
        return ops.neg(logprobs.mean()), {}


class Scores(nn.Cell):
    """A reward model's scores at the given positions."""

    def __init__(self, decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, index):
        return self.decoder.scores(ops.gather(self.decoder(tokens, positions, segments), index, 0))


class Everything(NextTokenLoss):
    """The mean cross-entropy at the given positions, and of all: hidden states, logits and a critic's values."""

    def __init__(self, decoder):
        super().__init__(decoder)
        self.value_head = ValueHead(decoder.config.hidden_size)

    def construct(self, tokens, positions, segments, index, labels):
        hidden = self.decoder(tokens, positions, segments)
        logprobs, _ = hidden_logprobs(self.decoder, ops.gather(hidden, index, 0), labels, 1.0, False)
        return ops.neg(logprobs.mean()), hidden, self.decoder.logits(hidden), self.value_head(hidden)


class PairLossAndScores(Scores):
    """-log sigmoid of the first score minus the second, and the scores."""

    def construct(self, tokens, positions, segments, index):
        scores = self.decoder.scores(ops.gather(self.decoder(tokens, positions, segments), index, 0))
        return -ops.logsigmoid(scores[0] - scores[1]), scores
