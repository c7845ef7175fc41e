"""A trained process reward model at work: every step of an answer judged, and the answer by its steps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mindrlhf.config import RewardFunctionConfig
from mindrlhf.data.judged_steps import join_steps, step_token_ids
from mindrlhf.data.tokenizers import encode
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS, Layout
from mindrlhf.trainer.reward_model import packed, refuse_beyond_window
from mindrlhf.trainer.roles import Policy, open_checkpoint
from mindrlhf.types import Conversation
from mindrlhf.wrapper.step_scorer import StepScorer

REDUCTIONS: dict[str, Callable[[np.ndarray], float]] = {
    "min": np.min,
    "mean": np.mean,
    "product": np.prod,
    "last": lambda judgements: judgements[-1],
}


class ProcessRewardModel:
    """A language model, made by `mindrlhf prm`, read at a placeholder behind every step. arXiv 2312.08935.

    An answer's steps end with `step_separator`; blank ones are not judged. The placeholder stands before the separator,
    or in its place where the two are the same text.
    """

    def __init__(self, policy: Policy, config: RewardFunctionConfig, rows: int = 16):
        """config: its keys for processes; rows: packed rows a micro-batch. Raises UserError."""
        if not config.step_separator:
            raise UserError("step_separator: is empty; give what ends a step, such as a line end")
        self.policy, self.config, self.rows = policy, config, rows
        self.placeholder, reward_tokens = step_token_ids(policy.tokenizer, config.steps)
        self.scorer = StepScorer(policy.decoder, reward_tokens)

    @classmethod
    def open(
        cls, directory: str | Path, config: RewardFunctionConfig, layout: Layout = ONE_PROCESS
    ) -> "ProcessRewardModel":
        """layout: how processes share it. Raises UserError where the directory holds no language model."""
        policy = open_checkpoint(directory, layout=layout)
        if policy.decoder.config.head != "logits":
            problem = "a reward model of whole answers, not one of steps"
            raise UserError(f"{directory}: {problem}; remove process, or train one with `mindrlhf prm`")
        return cls(policy, config)

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """[answers] float32 in [0, 1] of answers as text to rendered prompts, reduced over their steps."""
        reduce = REDUCTIONS[self.config.step_reduction]
        return np.array([reduce(judged) for judged in self.judgements(prompts, answers)], np.float32)

    def judgements(self, prompts: Sequence[str], answers: Sequence[str]) -> list[np.ndarray]:
        """Of each answer, [steps] float32 in [0, 1]; see StepScorer. Raises UserError beyond the window."""
        if not answers:
            return []
        solutions = [self._marked(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        packing = packed(solutions, self.rows, self.policy.decoder.config.max_positions)
        return packing.collect(self.scorer.score(packing.batches))

    def _marked(self, prompt: str, answer: str) -> Conversation:
        """Tokens with a placeholder behind each step, tokenised apart as in training."""
        pieces = self._pieces(answer)
        ids = encode(self.policy.tokenizer, [prompt, *pieces])
        window = self.policy.decoder.config.max_positions
        refuse_beyond_window(sum(map(len, ids)) + len(pieces), window)
        joined, judged = join_steps([*ids, np.zeros(0, np.int32)], self.placeholder)
        return Conversation(joined, judged)

    def _pieces(self, answer: str) -> list[str]:
        """What stands before each placeholder; an answer without any step is one, since it has to be judged."""
        separator = self.config.step_separator
        between = "" if separator == self.config.steps.placeholder else separator
        pieces, gap = [], ""
        for number, step in enumerate(answer.split(separator)):
            gap += between if number else ""
            if step.strip():
                pieces.append(gap + step)
                gap = ""
            else:
                gap += step
        return pieces or [answer]
