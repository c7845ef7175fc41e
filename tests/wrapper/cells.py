"""Cells that tests compile."""

import mindspore as ms
from mindspore import nn

from mindrlhf.wrapper.sampling import next_token
from mindrlhf.wrapper.scorer import target_logprobs


class NextToken(nn.Cell):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def construct(self, logits, uniform, temperature, top_k, top_p, min_p):
        return next_token(logits, uniform, temperature, top_k, top_p, min_p, self.features)


class Quadratic(nn.Cell):
    """0.5 sum(scale * parameter^2) + slope . parameter for two parameters, a matrix and a vector."""

    def __init__(self, matrix, vector):
        super().__init__(auto_prefix=False)
        self.matrix, self.vector = matrix, vector

    def construct(self, scale, slope):
        loss = 0.5 * (self.matrix * self.matrix * scale).sum() + (self.vector * slope).sum()
        return loss, {"seen": scale.sum(), "largest_max": slope.max()}


class TargetGradients(nn.Cell):
    """Log-probs and entropy at the targets, and the gradients of a weighted sum of both."""

    def __init__(self, decoder, temperature, entropy_gradient):
        super().__init__(auto_prefix=False)
        self.decoder, self.temperature, self.entropy_gradient = decoder, temperature, entropy_gradient
        self.gradient = ms.value_and_grad(self.loss, None, decoder.trainable(), has_aux=True)

    def loss(self, tokens, positions, segments, index, labels, of_logprob, of_entropy):
        logprobs, entropy = target_logprobs(
            self.decoder, tokens, positions, segments, index, labels, self.temperature, self.entropy_gradient
        )
        return (logprobs * of_logprob + entropy * of_entropy).sum(), (logprobs, entropy)

    def construct(self, *inputs):
        (_, outputs), gradients = self.gradient(*inputs)
        return outputs, gradients
