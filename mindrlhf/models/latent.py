"""Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434; as transformers' deepseek_v3 has it.

Keys and values of all heads come from one narrow vector a token, and one rotated key that the heads share. Only those
are cached. In decoding the matrices that would make keys and values of it are applied to the query and to what was
attended instead, so that a token's cached vector is read as it is: one head for all.
"""

import math

from mindspore import nn, ops

from mindrlhf.models import kernels
from mindrlhf.models.collectives import GatherTokens
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.layers import Linear, Make, Norm, rotation

LATENT_EPSILON = 1e-6  # of the norms of the narrow vectors, whatever rms_norm_eps is


class LatentAttention(nn.Cell):
    """Of this rank's heads. Every rank makes the narrow vectors of all tokens."""

    def __init__(self, config: DecoderConfig, name: str, make: Make):
        super().__init__(auto_prefix=False)
        self.latent, self.heads = config.latent, config.num_heads // make.shard.tensor.size
        self.width = max(config.head_dim, config.latent.value)
        self.scale = attention_scale(config)
        self.copy = make.shard.copy()
        sequence = make.shard.sequence
        self.gather_tokens = GatherTokens(sequence) if sequence.size > 1 else None
        if config.latent.query_rank:
            self.q_a_proj = Linear(f"{name}.q_a_proj", make, False)
            self.q_a_layernorm = Norm(f"{name}.q_a_layernorm", make, LATENT_EPSILON)
            self.q_proj = Linear(f"{name}.q_b_proj", make, False)
        else:
            self.q_a_proj = self.q_a_layernorm = None
            self.q_proj = Linear(f"{name}.q_proj", make, False)
        self.kv_a_proj = Linear(f"{name}.kv_a_proj_with_mqa", make, False)
        self.kv_a_layernorm = Norm(f"{name}.kv_a_layernorm", make, LATENT_EPSILON)
        # Always [out, in]: decoding takes it apart by heads.
        self.kv_b_proj = Linear(f"{name}.kv_b_proj", make._replace(transposed=False), False)
        self.o_proj = Linear(f"{name}.o_proj", make, False)
        self.rotation = rotation(config.latent.rope)
        self.scatter_update = ops.ScatterUpdate()
        self.dtype = make.dtype

    def _query(self, x, cos, sin):
        """x [M, H] -> the part that is not rotated [M, heads, nope], and the rotated one [M, heads, rope]."""
        if self.q_a_proj is not None:
            x = self.q_a_layernorm(self.q_a_proj(x))
        query = self.q_proj(self.copy(x)).reshape(-1, self.heads, self.latent.nope + self.latent.rope)
        return query[:, :, : self.latent.nope], kernels.rotate(query[:, :, self.latent.nope :], cos, sin, self.rotation)

    def _cached(self, x, cos, sin):
        """x [M, H] -> [M, 1, kv_rank + rope]: the narrow vector, and the rotated key."""
        both = self.kv_a_proj(x)
        narrow = self.kv_a_layernorm(both[:, : self.latent.kv_rank])
        key = kernels.rotate(both[:, self.latent.kv_rank :].expand_dims(1), cos, sin, self.rotation)
        return ops.concat((narrow.expand_dims(1), key), 2)

    def construct(self, x, positions, segments, cos, sin, mask):
        """x [B*T, H] -> (attended [B*T, heads * value], what is cached: [B*T, 1, kv_rank + rope])."""
        plain, turned = self._query(x, cos, sin)
        cached = self._cached(x, cos, sin)
        both = self.copy(cached)
        if self.gather_tokens is not None:
            both = self.gather_tokens(both.reshape(mask.shape[0], -1, *both.shape[1:])).reshape(-1, *both.shape[1:])
        nope, kv_rank = self.latent.nope, self.latent.kv_rank
        keys = self.kv_b_proj(both[:, 0, :kv_rank]).reshape(-1, self.heads, nope + self.latent.value)
        shared = ops.broadcast_to(both[:, :, kv_rank:], (both.shape[0], self.heads, self.latent.rope))
        query = self._padded(ops.concat((plain, turned), 2))
        key, value = self._padded(ops.concat((keys[:, :, :nope], shared), 2)), self._padded(keys[:, :, nope:])
        if self.gather_tokens is None:
            attended = kernels.attention(query, key, value, positions, segments, mask, self.scale, self.dtype)
        else:
            attended = kernels.composed_attention(query, key, value, mask, self.scale, self.dtype)
        attended = attended.reshape(-1, self.heads, self.width)[:, :, : self.latent.value]
        return attended.reshape(-1, self.heads * self.latent.value), (cached,)

    def _padded(self, x):
        """With zeros to one width for queries, keys and values, as the kernel wants it."""
        missing = self.width - x.shape[2]
        return ops.concat((x, ops.zeros((*x.shape[:2], missing), x.dtype)), 2) if missing else x

    def decode(self, x, positions, cos, sin, mask, rows, cache, same_cache):
        """x [S, H] -> [S, heads * value]. cache [S*L, kv_rank + rope] is written at rows [S]."""
        latent, slots, length = self.latent, x.shape[0], mask.shape[2]
        plain, turned = self._query(x, cos, sin)
        cache = self.scatter_update(cache, rows, self._cached(x, cos, sin)[:, 0])
        weight = self.kv_b_proj.weight.reshape(self.heads, latent.nope + latent.value, latent.kv_rank)
        narrow = ops.bmm(plain.transpose(1, 0, 2), weight[:, : latent.nope]).transpose(1, 0, 2)
        query = ops.concat((narrow, turned), 2) * self.scale
        cached = cache.reshape(slots, length, latent.kv_rank + latent.rope)
        weights = ops.softmax(ops.bmm(query, cached.transpose(0, 2, 1)) + mask, -1)
        seen = ops.bmm(weights, cached)[:, :, : latent.kv_rank].transpose(1, 2, 0)
        out = ops.bmm(weight[:, latent.nope :], seen).transpose(2, 0, 1)
        return out.reshape(slots, self.heads * latent.value)


def attention_scale(config: DecoderConfig) -> float:
    """1 / sqrt(head_dim), times YaRN's factor squared where mscale_all_dim asks for it."""
    scaling = config.rope_scaling or {}
    factor = 1.0
    if scaling.get("mscale_all_dim") and scaling["factor"] > 1:
        factor = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1.0
    return config.head_dim**-0.5 * factor * factor
