"""The compiled half of LoRA: an adapter's share of a projection's output, and its dropout."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.lora import MODULES, A, B, Lora
from mindrlhf.models.shapes import Weights
from mindrlhf.models.shard import Shard

# The multipliers of MurmurHash3's finaliser (Appleby, public domain), as the int32 of the same bits.
FIRST, SECOND = (np.uint32(constant).astype(np.int32) for constant in (0x85EBCA6B, 0xC2B2AE35))

_xor, _and, _shift = ops.BitwiseXor(), ops.BitwiseAnd(), ops.RightShift()


class Adapters:
    """Makes the adapters of one decoder, and holds what they share.

    scale and seed are Parameters that nothing trains: compiled cells see another value without recompiling.
    """

    def __init__(self, lora: Lora, shapes: dict[str, tuple[int, ...]], weights: Weights, shard: Shard, dtype: ms.Type):
        """shapes: of the whole adapters; weights: this rank's slices of them; dtype: see kernels."""
        self.lora, self.shapes, self.weights, self.shard, self.dtype = lora, shapes, weights, shard, dtype
        self.scale = Parameter(Tensor(lora.scale, ms.float32), name="lora.scale", requires_grad=False)
        self.seed = Parameter(Tensor(0, ms.int32), name="lora.dropout_seed", requires_grad=False)

    def __call__(self, module: str) -> "Adapter | None":
        """That of a projection such as model.layers.0.self_attn.q_proj; None where it has none."""
        return Adapter(self, module) if f"{module}.{A}" in self.shapes else None


class Adapter(nn.Cell):
    """x [M, in] -> scale B A dropout(x) [M, out]."""

    def __init__(self, adapters: Adapters, module: str):
        super().__init__(auto_prefix=False)
        self.a, self.b = (
            Parameter(Tensor(np.array(adapters.weights(name), np.float32, order="C")), name=name)
            for name in (f"{module}.{A}", f"{module}.{B}")
        )
        self.scale, self.dtype = adapters.scale, adapters.dtype
        self.dropout = None
        if adapters.lora.dropout > 0:
            *_, layer, _, kind = module.split(".")
            key = int(layer) * len(MODULES) + MODULES.index(kind)
            whole = adapters.shapes[f"{module}.{A}"]
            columns = adapters.shard.layout.box(f"{module}.{A}", whole, adapters.shard.tensor.index)[1]
            self.dropout = Dropout(adapters.lora.dropout, adapters.seed, whole[1], key, columns)

    def construct(self, x):
        if self.dropout is not None:
            x = self.dropout(x)
        inner = kernels.linear(x, self.a, None, False, self.dtype) * self.scale
        return kernels.linear(inner, self.b, None, False, self.dtype)


class Dropout(nn.Cell):
    """x [M, width] with a share of its elements 0 and the others larger by as much; as it is while seed is 0.

    Which elements is a hash of (seed, key, row, column) in int32 arithmetic that wraps: no state, so a resumed run
    leaves out what the uninterrupted one would have, and forward and backward agree. A row has two numbers, from
    MurmurHash3's finaliser of the row and the seed; a column has two random ones, which depend on the key. The hash is
    the product of the two sums, of which only the upper bits count: three operations over the whole of x, and none of
    them a shift, which costs eight times as much on a CPU.
    """

    def __init__(self, share: float, seed: Parameter, width: int, key: int, own: slice = slice(None)):
        """own: the columns of [M, width] that x has, where tensor ranks split them."""
        super().__init__(auto_prefix=False)
        self.seed = seed
        columns = np.random.default_rng((0, key)).integers(-(2**31), 2**31, (2, 1, width), dtype=np.int32)[..., own]
        self.columns, self.more_columns = Tensor(columns[0]), Tensor(columns[1])
        self.first, self.second = Tensor(FIRST), Tensor(SECOND)
        self.bits = {count: (Tensor(count, ms.int32), Tensor(2 ** (32 - count) - 1, ms.int32)) for count in (13, 16)}
        # Hashes from here on are kept; with seed 0 that is all of them.
        self.least = Tensor(np.array(round(share * 2**32) - 2**31).astype(np.int32))
        self.none, self.one = Tensor(-(2**31), ms.int32), Tensor(1.0, ms.float32)
        self.factor = Tensor(1 / (1 - share), ms.float32)

    def _folded(self, x, count):
        """x ^ (x >>> count); the shift of int32 repeats the sign, so its bits are masked."""
        bits, mask = self.bits[count]
        return _xor(x, _and(_shift(x, bits), mask))

    def construct(self, x):
        rows = ops.arange(x.shape[0]).astype(ms.int32).reshape(-1, 1) + self.seed * self.second
        rows = self._folded(rows, 16) * self.first
        rows = self._folded(self._folded(rows, 13) * self.second, 16)
        more_rows = self._folded(rows * self.first, 16)
        hashes = (rows + self.columns) * (more_rows + self.more_columns)
        off = self.seed == 0
        kept = ops.cast(hashes >= ops.select(off, self.none, self.least), ms.float32)
        return x * ops.stop_gradient(kept * ops.select(off, self.one, self.factor))
