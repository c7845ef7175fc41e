"""A checkpoint's tensors and the decoder's: the same numbers under other names, in another order.

Every step can be undone without rounding: a rename; a fused projection (W_pack, gate_up_proj, c_attn) is cut into the
decoder's; experts are stacked into one tensor; GPT-2's matrices are turned; and where a family pairs rotary neighbours,
or rotates a part of a head only, the rows of queries and keys are put in the order in which the decoder's one rotation
(pairs half a head apart) does the same. "Stored" names are the checkpoint's.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.shapes import Weights, expected_shapes

Source = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # stored name, shape, what returns it as float32


class Part(NamedTuple):
    """One of the decoder's tensors, or an expert's matrix of one, as the rows of a stored tensor."""

    name: str  # the decoder's
    expert: int | None
    rows: slice  # of the stored tensor, when it is [out, in]
    order: tuple[int, ...] | None  # row i of ours is row order[i] of those; None: as they are
    transposed: bool  # stored as [in, out]

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The decoder's array out of the stored one; a view where possible."""
        part = (stored.T if self.transposed else stored)[self.rows]
        return part if self.order is None else part[list(self.order)]

    def write(self, stored: np.ndarray, ours: np.ndarray) -> None:
        """The inverse of `read`, into its rows."""
        rows = (stored.T if self.transposed else stored)[self.rows]
        if self.order is None:
            rows[...] = ours
        else:
            rows[list(self.order)] = ours


class Stored(NamedTuple):
    """A stored tensor, and what it holds."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@lru_cache(maxsize=8)
def stored_tensors(config: DecoderConfig) -> Mapping[str, Stored]:
    """Every tensor of the family's checkpoint by its stored name, in the order of the forward pass."""
    found: dict[str, Stored] = {}
    for name, shape in expected_shapes(config).items():
        is_stacked = len(shape) == 3
        for expert in range(shape[0]) if is_stacked else (None,):
            rows, *columns = shape[1:] if is_stacked else shape
            stored = _stored_name(config, name, expert)
            before = found[stored].parts if stored in found else ()
            first = before[-1].rows.stop if before else 0
            is_turned = config.family.transposed and ".layers." in name and len(columns) > 0
            part = Part(name, expert, slice(first, first + rows), _order(config, name), is_turned)
            whole = (first + rows, *columns)
            found[stored] = Stored(whole[::-1] if is_turned else whole, (*before, part))
    return found


def stored_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of every tensor that the family's checkpoint has."""
    return {name: stored.shape for name, stored in stored_tensors(config).items()}


def from_stored(config: DecoderConfig, tensors: Weights) -> Weights:
    """tensors: stored name -> array. Returns the same by the decoder's names; a tensor is read when it is asked for."""
    sources: dict[str, list[tuple[str, Part]]] = {}
    for stored, (_, parts) in stored_tensors(config).items():
        for part in parts:
            sources.setdefault(part.name, []).append((stored, part))

    def weights(name: str) -> np.ndarray:
        first, *others = sources[name]
        if first[1].expert is None:
            return first[1].read(tensors(first[0]))
        whole = np.empty((1 + len(others), first[1].rows.stop, *tensors(first[0]).shape[1:]), np.float32)
        for stored, part in (first, *others):
            whole[part.expert] = part.read(tensors(stored))
        return whole

    return weights


def to_stored(
    config: DecoderConfig, weights: Weights, of_expert: Callable[[str, int], np.ndarray] | None = None
) -> Iterator[Source]:
    """The inverse: (stored name, shape, getter) of every tensor, for hf.write_tensors.

    of_expert: (name, number) -> one expert's matrix, where that costs less than all of them.
    """

    def array(stored: Stored) -> np.ndarray:
        only = stored.parts[0]
        if len(stored.parts) == 1 and only.order is None:
            found = ours(only)
            return found.T if only.transposed else found
        whole = np.empty(stored.shape, np.float32)
        for part in stored.parts:
            part.write(whole, ours(part))
        return whole

    def ours(part: Part) -> np.ndarray:
        if part.expert is None:
            return weights(part.name)
        return of_expert(part.name, part.expert) if of_expert else weights(part.name)[part.expert]

    for name, stored in stored_tensors(config).items():
        yield name, stored.shape, lambda stored=stored: array(stored)


def is_stored_as_it_is(config: DecoderConfig, module: str) -> bool:
    """Whether the checkpoint has that projection of every layer under the decoder's name, the numbers in its order."""
    found = [
        len(stored.parts) == 1 and part.name == name and part.order is None and not part.transposed
        for name, stored in stored_tensors(config).items()
        for part in stored.parts
        if f".{module}." in part.name
    ]
    return bool(found) and all(found)


def _stored_name(config: DecoderConfig, name: str, expert: int | None) -> str:
    for fused, modules in config.family.fused.items():
        for module in modules:
            name = name.replace(f".{module}.", f".{fused}.")
    for ours, theirs in config.family.renames:
        name = name.replace(ours, theirs)
    return name if expert is None else name.replace(".experts.", f".experts.{expert}.")


@lru_cache(maxsize=64)
def _order(config: DecoderConfig, name: str) -> tuple[int, ...] | None:
    """Of the rows of that tensor; None where they are as stored."""
    module, latent = name.split(".")[-2], config.latent
    half_order = rotary_order(config.rotated if latent else config.head_dim, config.rotated, config.family.interleaved)
    if half_order is None or not name.startswith("model.layers."):
        return None
    if latent:
        if module == "kv_a_proj_with_mqa":
            return (*range(latent.kv_rank), *(latent.kv_rank + row for row in half_order))
        half_order = (*range(latent.nope), *(latent.nope + row for row in half_order))
        heads = config.num_heads if module in ("q_proj", "q_b_proj") else 0
    else:
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(module, 0)
    return tuple(head * config.head_dim + row for head in range(heads) for row in half_order) or None


def rotary_order(width: int, rotated: int, interleaved: bool) -> tuple[int, ...] | None:
    """Which number of a stored head stands at each place of ours; None where all stay.

    Ours turns number i with number i + width / 2. Stored are the first `rotated` numbers' pairs: neighbours where
    interleaved, else rotated / 2 apart. The others are not turned, so any order of them will do.
    """
    if rotated == width and not interleaved:
        return None
    half, rest = rotated // 2, (width - rotated) // 2
    pairs = (range(0, rotated, 2), range(1, rotated, 2)) if interleaved else (range(half), range(half, rotated))
    return (*pairs[0], *range(rotated, rotated + rest), *pairs[1], *range(rotated + rest, width))
