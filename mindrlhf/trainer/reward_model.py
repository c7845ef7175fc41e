"""A trained reward model at work: a number for each answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindrlhf.data.packing import Packing, bucket, pack, row_width
from mindrlhf.data.tokenizers import encode
from mindrlhf.data.turns import end_of_sequence, join
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS, Layout
from mindrlhf.trainer.roles import Policy, open_checkpoint
from mindrlhf.types import Conversation
from mindrlhf.wrapper.scorer import ScoreHead


class RewardModel:
    """Scores whole answers at their last token, the stop token."""

    def __init__(self, policy: Policy, rows: int = 16):
        """rows: packed rows a micro-batch."""
        self.policy, self.rows = policy, rows
        self.head = ScoreHead(policy.decoder)

    @classmethod
    def open(cls, directory: str | Path, layout: Layout = ONE_PROCESS) -> "RewardModel":
        """layout: how processes share it. Raises UserError where the directory holds no reward model."""
        policy = open_checkpoint(directory, layout=layout)
        if policy.decoder.config.head != "score":
            raise UserError(f"{directory}: a language model, not a reward model; train one with `mindrlhf rm`")
        return cls(policy)

    def scores(self, answers: Sequence[Conversation]) -> np.ndarray:
        """[answers] float32, as the head gives them."""
        if not answers:
            return np.zeros(0, np.float32)
        endings = [ending(answer) for answer in answers]
        packing = packed(endings, self.rows, self.policy.decoder.config.max_positions)
        return np.concatenate(packing.collect(self.head.score(packing.batches)))

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """[answers] float32 of answers as text to rendered prompts, see `conversations`."""
        return self.scores(self.conversations(prompts, answers))

    def conversations(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Conversation]:
        """Answers as text to rendered prompts, by this model's own tokenizer, each with the stop token that its
        training had. Without a prompt the answer is taken to begin with its own.

        Raises UserError for what its window does not hold and where there is no token at all.
        """
        tokenizer = self.policy.tokenizer
        ends = self.policy.generation_config.get("eos_token_id")
        stop = ends[0] if isinstance(ends, list) and ends else end_of_sequence(tokenizer)
        ids = encode(tokenizer, [*prompts, *answers])
        found = []
        for prompt, answer in zip(ids[: len(prompts)], ids[len(prompts) :], strict=True):
            if not len(prompt):
                prompt, answer = answer[:1], answer[1:]
            if not len(prompt):
                raise UserError("the reward model was given neither a prompt nor an answer; fill one of them")
            found.append(join(prompt, answer, stop))
        longest = max((len(conversation.ids) for conversation in found), default=0)
        refuse_beyond_window(longest, self.policy.decoder.config.max_positions)
        return found

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """(score - mean) / std, of the evaluation set that the checkpoint remembers."""
        config = self.policy.decoder.config
        return (scores - config.score_mean) / max(config.score_std, 1e-8)


def ending(conversation: Conversation) -> Conversation:
    """The same with its last token, where a reward model is read, as the only target."""
    last = np.zeros(len(conversation.ids), bool)
    last[-1] = True
    return Conversation(conversation.ids, last)


def refuse_beyond_window(tokens: int, window: int) -> None:
    """Raises UserError where a prompt with its answer has more tokens than the reward model's window."""
    if tokens > window:
        problem = f"a prompt with its answer is {tokens} tokens, the reward model's window is {window}"
        raise UserError(f"{problem}; lower sampling.max_tokens, or give a reward model with a larger one")


def packed(sequences: Sequence[Conversation], rows: int, window: int) -> Packing:
    """Micro-batches of at most `rows` rows for a model that is read at the trained tokens themselves.

    Widths are buckets, and few sequences take a half of the rows, or a half of these: sizes change from call to call,
    and each shape is a graph to compile.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    width = min(bucket(max(lengths)), row_width(window))
    needed = len(pack(lengths, width))
    while rows >= 2 * needed and rows % 2 == 0:
        rows //= 2
    ids, judged = [s.ids for s in sequences], [s.trained for s in sequences]
    return Packing.of(ids, judged, rows, width, shift=0)
