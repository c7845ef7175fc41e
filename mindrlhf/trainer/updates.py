"""From answers with their numbers to the micro-batches of optimizer steps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mindrlhf.advantages import loss_weights
from mindrlhf.config import OnlineConfig
from mindrlhf.data.packing import Packing
from mindrlhf.layout import Layout
from mindrlhf.trainer.credit import Credit, Scores
from mindrlhf.trainer.layouts import row_multiple
from mindrlhf.types import PackedRows, Rollout


class Update(NamedTuple):
    """The micro-batches of one optimizer step."""

    policy: list[NamedTuple]
    critic: list[NamedTuple]  # of a critic that has its own optimizer


def chunks(rollouts: Sequence[Rollout], count: int) -> list[list[Rollout]]:
    """Split into at most `count` parts of whole groups, for as many optimizer steps."""
    groups = sorted({rollout.group for rollout in rollouts})
    parts = [set(part.tolist()) for part in np.array_split(groups, min(count, max(len(groups), 1)))]
    return [[rollout for rollout in rollouts if rollout.group in part] for part in parts if part]


def row_tokens(config: OnlineConfig) -> int:
    """Width of a packed row."""
    return config.trainer.row_tokens or config.rollout.max_prompt_tokens + config.rollout.sampling.max_tokens


def pack(rollouts: Sequence[Rollout], config: OnlineConfig, layout: Layout) -> Packing:
    """For that layout of training. The targets are the sampled tokens: what an environment wrote is not trained."""
    sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
    targets = [np.concatenate([np.zeros(len(r.prompt_ids), bool), r.is_sampled]) for r in rollouts]
    return Packing.of(sequences, targets, config.trainer.rows, row_multiple(row_tokens(config), layout))


def make_update(
    packing: Packing, scores: Scores, credit: Credit, aggregation: str, max_tokens: int, kinds: tuple[type, type | None]
) -> Update:
    """kinds: the batch types of the policy's and of the critic's train step; the latter None where it has none.

    Weights are over the whole optimizer step, so that its loss does not depend on the split into micro-batches.
    """
    counts = [len(old) for old in scores.old]

    def weights(mode: str) -> list[np.ndarray]:
        return [np.full(n, w, np.float32) for n, w in zip(counts, loss_weights(counts, mode, max_tokens), strict=True)]

    fields = {
        "loss_weight": weights(aggregation),
        "advantages": credit.advantages,
        "old_logprobs": scores.old,
        "ref_logprobs": scores.ref,
        "value_weight": weights("token_mean"),
        "old_values": scores.values,
        "returns": credit.returns,
    }

    def batches(kind: type | None) -> list[NamedTuple]:
        if kind is None:
            return []
        own = [packing.spread(fields[name]) for name in kind._fields[len(PackedRows._fields) :]]
        return [kind(*rows, *(values[i] for values in own)) for i, rows in enumerate(packing.batches)]

    return Update(*map(batches, kinds))
