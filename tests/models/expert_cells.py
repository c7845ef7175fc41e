"""The cells that test_experts.py compiles."""

from mindspore import nn

from mindrlhf.models import expert_kernels


class ExpertMlp(nn.Cell):
    """With our kernel where there is one (own), or the composed form."""

    def __init__(self, own, first, transposed):
        super().__init__()
        self.own, self.first, self.transposed = own, first, transposed

    def construct(self, x, best, shares, gate, up, down):
        if self.own:
            return expert_kernels.expert_mlp(x, best, shares, gate, up, down, self.first, self.transposed)
        return expert_kernels.composed_expert_mlp(x, best, shares, gate, up, down, self.first, self.transposed)


class Shares(nn.Cell):
    """A router's shares alone."""

    def __init__(self, router):
        super().__init__(auto_prefix=False)
        self.router = router

    def construct(self, x, real):
        return self.router(x, real)[1]


class Layer(nn.Cell):
    """Experts without residual and norm."""

    def __init__(self, experts):
        super().__init__(auto_prefix=False)
        self.experts = experts

    def construct(self, x):
        return self.experts(x * 0.0, x, None, None)
