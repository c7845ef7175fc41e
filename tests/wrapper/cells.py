"""Cells that tests compile."""

from mindspore import nn

from mindrlhf.wrapper.sampling import next_token


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
