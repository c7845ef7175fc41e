"""What MindFormers' GLM lacks on a CPU: its norm is a fused kernel, and its mask wraps around when it is multiplied."""

from mindspore import nn, ops


class Norm(nn.Cell):
    """ops.RmsNorm, composed."""

    def __init__(self, epsilon):
        super().__init__(auto_prefix=False)
        self.epsilon = epsilon
        self.mean = ops.ReduceMean(keep_dims=True)

    def construct(self, x, weight):
        return x * ops.rsqrt(self.mean(x * x, -1) + self.epsilon) * weight, x


class GlmLogits(nn.Cell):
    """Tokens [B, T] and a float mask [1, 1, T, T], 1 where a token is not seen -> logits [B, T, V]."""

    def __init__(self, network, epsilon):
        super().__init__(auto_prefix=False)
        self.transformer = network.transformer
        for _, cell in network.cells_and_names():
            if type(cell).__name__ == "ChatGLM2RMSNorm":
                del cell.norm
                cell.norm = Norm(epsilon)

    def construct(self, tokens, mask):
        return self.transformer.output_layer(self.transformer(tokens, full_attention_mask=mask))
