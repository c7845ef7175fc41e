"""The experts' arithmetic: every token through its own experts, and no token through others, or dropped."""

import mindspore as ms
from mindspore import Tensor, ops

from mindrlhf.models import cpu_kernels
from mindrlhf.models.kernels import composed_swiglu, product

_own = cpu_kernels.PRIMITIVES
_has_own = _own is not None
_batch_matmul = ops.BatchMatMul()
_batch_matmul_nt = ops.BatchMatMul(transpose_b=True)


def expert_mlp(x, best, shares, gate, up, down, first: int, transposed: bool, dtype=ms.float32):
    """The sum over a token's experts of share * down (silu(gate x) * up x), of those that are here.

    x [M, H]; best [M, k] int32, the numbers of each token's experts, all different, and shares [M, k]; gate and up
    [n, I, H] and down [n, H, I] of the experts first to first + n - 1, the last two axes swapped where transposed.
    Returns [M, H]; the shares of other experts have gradient 0. dtype: as in kernels.py.
    """
    if _has_own and dtype == ms.float32:
        settings = Tensor([first, int(transposed)], ms.int32)
        return _own.expert_mlp(x, best, shares, gate, up, down, settings)[0]
    return composed_expert_mlp(x, best, shares, gate, up, down, first, transposed, dtype)


def composed_expert_mlp(x, best, shares, gate, up, down, first: int, transposed: bool, dtype=ms.float32):
    """Every expert over every token, with share 0 where it was not chosen: the time of all experts."""
    count, matmul = gate.shape[0], _batch_matmul if transposed else _batch_matmul_nt
    every = ops.broadcast_to(x.expand_dims(0), (count, *x.shape))
    hidden = composed_swiglu(product(matmul, every, gate, dtype), product(matmul, every, up, dtype))
    # A number outside of 0 to count - 1 becomes a row of zeros.
    chosen = ops.one_hot(best - first, count, ops.ones((), ms.float32), ops.zeros((), ms.float32))
    weights = (chosen * shares.expand_dims(2)).sum(1).transpose(1, 0).expand_dims(2)
    return product(matmul, hidden * weights, down, dtype).sum(0)
