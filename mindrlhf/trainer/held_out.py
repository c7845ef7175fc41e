"""Evaluation during online training: answers to held-out problems, greedy and sampled."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mindrlhf.config import SamplingConfig
from mindrlhf.trainer.collector import Collector
from mindrlhf.trainer.evaluation import evaluation_metrics
from mindrlhf.trainer.loop import mean
from mindrlhf.trainer.updates import pack
from mindrlhf.types import Prompt, Rollout
from mindrlhf.wrapper.scorer import Scorer


def evaluate_greedy(collector: Collector, prompts: Sequence[Prompt]) -> tuple[dict[str, float], list[Rollout]]:
    """The mean of every reward part over one greedy answer a prompt, and of their sum; and the answers."""
    answers = _answers(collector, prompts, 1, _at(collector, 0.0))
    values = {name: mean([r.reward_parts[name] for r in answers]) for name in answers[0].reward_parts}
    if len(values) > 1:
        values.setdefault("reward", mean([r.reward for r in answers]))
    return values, answers


def evaluate_sampled(collector: Collector, prompts: Sequence[Prompt]) -> dict[str, float]:
    """pass@k and maj@k as the config's evaluation section says, right by the first reward function."""
    evaluation = collector.config.evaluation
    answers = _answers(collector, prompts, evaluation.num_generations, _at(collector, evaluation.temperature))
    rewards = [answer.reward_parts[collector.first_part] for answer in answers]
    return evaluation_metrics(rewards, collector.texts(answers), evaluation.num_generations, evaluation.k)


def evaluate_kl(collector: Collector, prompts: Sequence[Prompt], ref: Scorer, kl_coef: float) -> dict[str, float]:
    """Over one answer a prompt, sampled as in training: its reward, its KL to the reference and what is left of it.

    The KL is in nats an answer, the sum over its tokens of policy - ref log-probs, whose mean is without bias where
    top-k, top-p and min-p are off.
    """
    answers = _answers(collector, prompts, 1, collector.config.rollout.sampling)
    packing = pack(answers, collector.config, collector.policy.decoder.layout)
    with collector.memory.phase("score reference", "reference"):
        scores = packing.collect(ref.score(packing.batches))
    kl = answer_kl([answer.sampled_logprobs[answer.is_sampled] for answer in answers], scores)
    reward = mean([answer.reward for answer in answers])
    return {"sampled_reward": reward, "kl": kl, "reward_minus_kl": reward - kl_coef * kl}


def answer_kl(policy: Sequence[np.ndarray], ref: Sequence[np.ndarray]) -> float:
    """The mean over answers of the sum of policy - ref log-probs, [S] float32 each: nats an answer."""
    return mean([np.sum(p - r, dtype=np.float64) for p, r in zip(policy, ref, strict=True)])


def _answers(collector: Collector, prompts: Sequence[Prompt], count: int, sampling: SamplingConfig) -> list[Rollout]:
    return [answer for group in collector.groups(prompts, count, sampling, 0) for answer in group]


def _at(collector: Collector, temperature: float) -> SamplingConfig:
    """The rollouts' limits and stop tokens at another temperature, and the whole distribution."""
    return replace(SamplingConfig(), temperature=temperature, **{
        name: getattr(collector.config.rollout.sampling, name) for name in ("max_tokens", "stop")
    })  # fmt: skip
