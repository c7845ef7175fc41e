"""A trained reward model at work: a number for each answer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindrlhf.data.packing import Packing, row_width
from mindrlhf.data.tokenizers import encode
from mindrlhf.data.turns import end_of_sequence, join
from mindrlhf.errors import UserError
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
    def open(cls, directory: str | Path) -> "RewardModel":
        """Raises UserError where the directory holds no reward model."""
        policy = open_checkpoint(directory)
        if policy.decoder.config.head != "score":
            raise UserError(f"{directory}: a language model, not a reward model; train one with `mindrlhf rm`")
        return cls(policy)

    def scores(self, answers: Sequence[Conversation]) -> np.ndarray:
        """[answers] float32, as the head gives them."""
        if not answers:
            return np.zeros(0, np.float32)
        width = row_width(max(len(answer.ids) for answer in answers))
        endings = [ending(answer) for answer in answers]
        packing = Packing.of([e.ids for e in endings], [e.trained for e in endings], self.rows, width, shift=0)
        return np.concatenate(packing.collect(self.head.score(packing.batches)))

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """[answers] float32 of answers as text to rendered prompts, by this model's own tokenizer, each with the stop
        token that its training had. Raises UserError for what its window does not hold."""
        tokenizer, window = self.policy.tokenizer, self.policy.decoder.config.max_positions
        ends = self.policy.generation_config.get("eos_token_id")
        stop = ends[0] if isinstance(ends, list) and ends else end_of_sequence(tokenizer)
        ids = encode(tokenizer, [*prompts, *answers])
        conversations = [join(*pair, stop) for pair in zip(ids[: len(prompts)], ids[len(prompts) :], strict=True)]
        longest = max((len(conversation.ids) for conversation in conversations), default=0)
        if longest > window:
            problem = f"a prompt with its answer is {longest} tokens, the reward model's window is {window}"
            raise UserError(f"--reward-model: {problem}; lower sampling.max_tokens")
        return self.scores(conversations)

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """(score - mean) / std, of the evaluation set that the checkpoint remembers."""
        config = self.policy.decoder.config
        return (scores - config.score_mean) / max(config.score_std, 1e-8)


def ending(conversation: Conversation) -> Conversation:
    """The same with its last token, where a reward model is read, as the only target."""
    last = np.zeros(len(conversation.ids), bool)
    last[-1] = True
    return Conversation(conversation.ids, last)
