"""The batch types: what flows between data, generation, rewards and the compiled cells."""

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem of a data set, ready to be answered."""

    ids: np.ndarray  # [P] int32, what the model reads, chat template applied
    text: str  # the same as text
    label: Any  # the reference answer, or None
    key: int  # position in the data set; keys the sampler, so that an answer does not depend on its batch
    row: dict[str, Any] = field(default_factory=dict)  # the data set's row, its columns for user reward functions


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer, ragged, on the host."""

    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray  # [R] int32, the stop token included where one was sampled
    sampled_logprobs: np.ndarray  # [R] float32, log-prob at the sampling temperature, before top-k and top-p
    finished: bool  # False: cut at max_tokens
    group: int  # answers to the same prompt share it
    reward: float = 0.0  # weighted sum of reward_parts
    reward_parts: dict[str, float] = field(default_factory=dict)
    sampled: np.ndarray | None = None  # [R] bool, False at tokens that an environment wrote; None: all were sampled
    token_rewards: np.ndarray | None = None  # [R] float32, an environment's, at the token that earned each
    greedy_reward: float = 0.0  # of the greedy answer to the same prompt, where the algorithm asks for it

    @property
    def is_sampled(self) -> np.ndarray:
        """[R] bool: the tokens that the policy is responsible for."""
        return np.ones(len(self.response_ids), bool) if self.sampled is None else self.sampled

    def state(self) -> dict[str, Any]:
        """JSON-able, and exact: a float32 survives as a Python float."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Rollout":
        """The inverse of `state`."""
        known = {name: dtype for name, dtype in _ROLLOUT_ARRAYS.items() if state[name] is not None}
        return cls(**{**state, **{name: np.array(state[name], dtype) for name, dtype in known.items()}})


_ROLLOUT_ARRAYS = {
    "prompt_ids": np.int32, "response_ids": np.int32, "sampled_logprobs": np.float32, "sampled": bool,
    "token_rewards": np.float32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """One supervised example: tokens, and which of them are trained."""

    ids: np.ndarray  # [N] int32
    trained: np.ndarray  # [N] bool, True where the token is a target


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt; `trained` marks the answer's tokens."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0  # by how much the chosen one is better


@dataclass(frozen=True, slots=True)
class Judgement:
    """One answer that somebody liked or did not."""

    answer: Conversation
    desirable: bool


@dataclass(frozen=True, slots=True)
class JudgedSteps:
    """A solution whose steps are judged, each at the placeholder token behind it."""

    ids: np.ndarray  # [N] int32
    judged: np.ndarray  # [N] bool, True at the K placeholders
    probabilities: np.ndarray  # [K, R] float32, over the reward tokens; one-hot for a hard label


class PackedRows(NamedTuple):
    """One micro-batch of sequences packed into rows of a fixed width; the first fields of every batch below.

    The decoder runs over the rows [B, T]; head and loss run at the N target positions only. Index n means the
    prediction of labels[n], made at flat position index[n] of the rows: the label shift is done when packing, once.
    """

    tokens: np.ndarray  # [B, T] int32
    positions: np.ndarray  # [B, T] int32, from 0 in each segment
    segments: np.ndarray  # [B, T] int32; 0 is padding, k is the k-th packed sequence of the row
    index: np.ndarray  # [N] int32, flat positions in B*T whose next token is labels[n]; padded with 0
    labels: np.ndarray  # [N] int32
    sequence: np.ndarray  # [N] int32, number of the sequence in the micro-batch; padding has the last number
    mask: np.ndarray  # [N] float32, 1 at real targets, 0 on padding


# PackedRows, and what the supervised loss needs: loss_weight [N] float32, 0 on padding; the aggregation lives in it.
SupervisedBatch = NamedTuple("SupervisedBatch", [*PackedRows.__annotations__.items(), ("loss_weight", np.ndarray)])

# PackedRows, and the target distribution over the reward tokens at each placeholder, [N, R] float32.
StepRewardBatch = NamedTuple(
    "StepRewardBatch", [*SupervisedBatch.__annotations__.items(), ("probabilities", np.ndarray)]
)

# PackedRows, and numbers of whole sequences: [N] float32 at the place of the sequence's number, 0 elsewhere.
# Sequence 2k is the chosen answer of pair k and 2k + 1 the rejected one; a pair's weight and margin stand at 2k.
PairBatch = NamedTuple(
    "PairBatch",
    [
        *PackedRows.__annotations__.items(),
        ("weight", np.ndarray),
        ("margin", np.ndarray),
        ("ref_logprobs", np.ndarray),  # of the reference policy, summed over the answer
    ],
)

# The same for unpaired answers: sign is 1 for a desirable one and -1 for an undesirable one; kl is KTO's baseline.
JudgementBatch = NamedTuple(
    "JudgementBatch",
    [
        *PackedRows.__annotations__.items(),
        ("weight", np.ndarray),
        ("sign", np.ndarray),
        ("ref_logprobs", np.ndarray),
        ("kl", np.ndarray),
    ],
)

# SupervisedBatch, and what the policy losses need, [N] float32 each: the advantages, the log-probs of the policy before
# this batch's first update, and those of the reference policy.
PolicyBatch = NamedTuple(
    "PolicyBatch",
    [
        *SupervisedBatch.__annotations__.items(),
        ("advantages", np.ndarray),
        ("old_logprobs", np.ndarray),
        ("ref_logprobs", np.ndarray),
    ],
)

# What a critic's loss needs beside PackedRows, [N] float32 each: the weight of its tokens, its values before this
# batch's first update, and the returns that they should have been.
_VALUE_FIELDS = [("value_weight", np.ndarray), ("old_values", np.ndarray), ("returns", np.ndarray)]

# For a critic with a decoder of its own, and for one on the policy's trunk.
ValueBatch = NamedTuple("ValueBatch", [*PackedRows.__annotations__.items(), *_VALUE_FIELDS])
ActorCriticBatch = NamedTuple("ActorCriticBatch", [*PolicyBatch.__annotations__.items(), *_VALUE_FIELDS])
