"""A layer of experts: each token's few best, weighted. Shazeer et al. 2017, arXiv 1701.06538; as Mixtral has it."""

import mindspore as ms
from mindspore import nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.layers import Linear, Make


class Expert(nn.Cell):
    """SwiGLU, or this rank's slice of one."""

    def __init__(self, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.w1 = Linear(f"{name}.w1", make, False)
        self.w2 = Linear(f"{name}.w2", make, False)
        self.w3 = Linear(f"{name}.w3", make, False)

    def construct(self, x):
        return self.w2(kernels.gated_linear(x, self.w1.weight, self.w3.weight, self.w1.transposed))


class Experts(nn.Cell):
    """Every tensor rank computes its own experts for all tokens, and one sum over the ranks brings them together: no
    token has to travel. No token is dropped either. An expert runs over every token, those that have not chosen it with
    weight 0, so the time is that of a dense layer of all experts on a rank.
    """

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.chosen, self.count, self.width = config.experts_per_token, config.num_experts, config.hidden_size
        self.gate = Linear(f"{name}.gate", make, False)
        experts = []
        for number in range(config.num_experts):
            expert = f"{name}.experts.{number}"
            if make.shard.holds(f"{expert}."):
                experts.append((number, Expert(expert, make)))
            else:  # all ranks ask for all weights, in one order: they may be brought together from several
                for kind in ("w1", "w2", "w3"):
                    make.weights(f"{expert}.{kind}.weight")
        self.owned = tuple(number for number, _ in experts)
        self.experts = nn.CellList([cell for _, cell in experts], auto_prefix=False)
        self.copy, self.sum = make.shard.copy(), make.shard.sum()

    def weights(self, x):
        """x [M, H] -> [M, E]: the softmax over all experts, 0 but for the best ones, which sum to 1."""
        shares = ops.softmax(self.gate(x), -1)
        _, best = ops.topk(ops.stop_gradient(shares), self.chosen)
        is_chosen = ops.one_hot(best, self.count, ops.ones((), ms.float32), ops.zeros((), ms.float32)).sum(1)
        shares = shares * is_chosen
        return shares / shares.sum(-1, keepdims=True)

    def construct(self, residual, x):
        # Both in one message of the backward pass: a rank sees the gradients of its own experts only.
        both = self.copy(ops.concat((x, self.weights(x)), 1))
        x, weights = both[:, : self.width], both[:, self.width :]
        out = self.experts[0](x) * weights[:, self.owned[0]].expand_dims(1)
        for i in range(1, len(self.owned)):
            out = out + self.experts[i](x) * weights[:, self.owned[i]].expand_dims(1)
        return residual + self.sum(out)
