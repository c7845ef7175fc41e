"""A layer of experts: each token's few best, weighted, and how their load is balanced. Shazeer et al. 2017,
arXiv 1701.06538; routers as Mixtral, Qwen3-MoE and DeepSeek-V3 (arXiv 2412.19437) have them.
"""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models.collectives import Group
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.expert_kernels import expert_mlp
from mindrlhf.models.layers import FeedForward, Linear, Make, parameter_of

NOWHERE = -1e9  # the score of an expert that a token must not choose


class Experts(nn.Cell):
    """Every tensor rank computes its own experts, or its slices of them, for all tokens that chose them, and one sum
    over the ranks brings them together: no token has to travel. No token is dropped either.
    """

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.width, self.transposed, self.dtype = config.hidden_size, make.transposed, make.dtype
        self.router = Router(config, f"{name}.gate", make)
        self.gate_proj, self.up_proj, self.down_proj = (
            _stacked(f"{name}.experts.{kind}_proj.weight", make) for kind in ("gate", "up", "down")
        )
        self.first = make.shard.first_expert(config.num_experts)
        self.shared_experts = FeedForward(config, f"{name}.shared_experts", make) if config.shared_width else None
        self.is_split = make.shard.tensor.size > 1
        self.copy, self.sum = make.shard.copy(), make.shard.sum()

    def construct(self, residual, x, norm, real):
        """residual + norm(experts of x [M, H]); real [M] is 0 at padding, None where nothing is trained."""
        best, shares = self.router(x, real)
        if self.is_split:  # both in one message of the backward pass: a rank sees its own experts' gradients only
            both = self.copy(ops.concat((x, shares), 1))
            x, shares = both[:, : self.width], both[:, self.width :]
        weights = self.gate_proj, self.up_proj, self.down_proj
        out = expert_mlp(x, best, shares, *weights, self.first, self.transposed, self.dtype)
        if self.shared_experts is not None:
            out = out + self.shared_experts.down_proj(self.shared_experts.inner(x))
        out = self.sum(out)
        return residual + (out if norm is None else norm(out))


def _stacked(name: str, make: Make) -> Parameter:
    weight = make.weights(name)
    return parameter_of(weight.swapaxes(1, 2) if make.transposed else weight, name)


class Router(nn.Cell):
    """Which experts a token goes to, and with which shares.

    The scores are a softmax over all experts, or a sigmoid each. A sigmoid's choice sees scores plus a bias, which is
    no weight of the loss: it is moved from outside to balance the load (Wang et al. 2024, arXiv 2408.15664).
    """

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.settings, self.count, self.chosen = config.router, config.num_experts, config.experts_per_token
        self.gate = Linear(name, make._replace(dtype=ms.float32), False)  # near scores must not become the same
        self.is_sigmoid = config.router.score == "sigmoid"
        self.bias = None
        if self.is_sigmoid:
            self.bias = parameter_of(make.weights(f"{name}.e_score_correction_bias"), f"{name}.e_score_correction_bias")
            self.bias.requires_grad = False
        self.is_balanced = False  # True: what is differentiated goes through `balance`
        self.balance = Balance(self.count, make.shard.sequence)
        # The weight of its loss by token: it is multiplied by the micro-batch's tokens.
        self.coef = Parameter(Tensor(0.0, ms.float32), name=f"{name}.balance_coef", requires_grad=False)
        # How often each expert was chosen, and sums over the tokens: their number, the entropy of their probabilities
        # in nats, the loss. In float32, so exact to 16 million choices of an expert.
        nothing = np.zeros(self.count + 3, np.float32)
        self.tally = Parameter(Tensor(nothing), name=f"{name}.tally", requires_grad=False)

    def construct(self, x, real):
        """x [M, H] -> best [M, k] int32, shares [M, k]."""
        logits = self.gate(x)
        scores = ops.sigmoid(logits) if self.is_sigmoid else ops.softmax(logits, -1)
        best = self._best(ops.stop_gradient(scores))
        if self.is_balanced and real is not None:
            scores = self.balance(scores, best, real, self.coef, self.tally)
        shares = ops.gather_elements(scores, 1, best)
        if self.settings.renormalise:
            shares = shares / (shares.sum(-1, keepdims=True) + 1e-20)
        return best, shares * self.settings.scale

    def _best(self, scores):
        if self.bias is not None:
            scores = scores + self.bias
        groups, top_groups = self.settings.groups, self.settings.top_groups
        if top_groups < groups:  # a group is as good as its two best experts together
            grouped = scores.reshape(-1, groups, self.count // groups)
            _, best_groups = ops.topk(ops.topk(grouped, 2)[0].sum(-1), top_groups)
            is_open = _counts(best_groups, groups).expand_dims(2)
            scores = ops.select(is_open > 0, grouped, ops.full_like(grouped, NOWHERE)).reshape(-1, self.count)
        return ops.topk(scores, self.chosen)[1]


def _counts(numbers, count: int):
    """numbers [M, k] -> [M, count] float32: how often each is among them."""
    return ops.one_hot(numbers, count, ops.ones((), ms.float32), ops.zeros((), ms.float32)).sum(1)


class Balance(nn.Cell):
    """Scores as they are. Behind them, in the backward pass, which training alone has, and has once: the gradient of a
    loss that balances the experts is added to theirs, and what the experts got is added to a tally.

    The loss of T tokens is E sum_i f_i P_i, with f_i the mean count of expert i in a token's choices, and P_i the mean
    of its probability, the scores divided by their sum (Switch, Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6,
    as transformers computes it for one layer; k with an even load). Gradients flow through P alone.
    """

    def __init__(self, count: int, sequence: Group):
        super().__init__(auto_prefix=False)
        self.count = count
        self.all_reduce = sequence.all_reduce() if sequence.size > 1 else None

    def construct(self, scores, best, real, coef, tally):
        """scores [M, E], best [M, k], real [M] float32: 0 for tokens that do not count; coef and tally: see Router."""
        return scores

    def bprop(self, scores, best, real, coef, tally, out, dout):
        total = ops.maximum(scores.sum(-1, keepdims=True), 1e-20)  # all of a token's sigmoids may be 0
        probabilities, real_rows = scores / total, real.expand_dims(1)
        loads = (_counts(best, self.count) * real_rows).sum(0)
        masses = (probabilities * real_rows).sum(0)
        entropy = -(probabilities * real_rows * ops.log(ops.maximum(probabilities, 1e-30))).sum()
        sums = ops.concat((loads, masses, ops.stack((real.sum(), entropy))))
        if self.all_reduce is not None:  # each sequence rank has a part of the tokens
            sums = self.all_reduce(ops.depend(sums, dout))
        loads, masses = sums[: self.count], sums[self.count : 2 * self.count]
        tokens, entropy = sums[2 * self.count], sums[2 * self.count + 1]
        per_token = loads * self.count / ops.maximum(tokens, 1.0)  # the loss is the probabilities' product with it
        loss = (per_token * masses).sum()
        counted = ops.assign_add(tally, ops.concat((loads, ops.stack((tokens, entropy, loss)))))
        slopes = per_token * coef
        gradient = (slopes - (probabilities * slopes).sum(-1, keepdims=True)) / total * real_rows
        done = ops.depend(dout + gradient, counted)
        return done, ops.zeros_like(best), ops.zeros_like(real), ops.zeros_like(coef), ops.zeros_like(tally)
