"""Online training: sample answers, reward them, train on them. One loop for every row of the algorithms' table."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.advantages import keep_group, kl_shaped_advantages, loss_weights, overlong_penalty
from mindrlhf.config import GRPOConfig, SamplingConfig, SFTConfig, TrainerConfig, TrainingConfig
from mindrlhf.data.packing import Packing
from mindrlhf.data.prompts import PromptDataset, PromptOrder
from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards
from mindrlhf.schedules import learning_rate
from mindrlhf.trainer.algorithms import resolve
from mindrlhf.trainer.loop import Trainer, check_numbers, mean
from mindrlhf.trainer.roles import Policy, open_policy
from mindrlhf.trainer.supervised import SFTTrainer
from mindrlhf.types import PolicyBatch, Prompt, Rollout
from mindrlhf.utils.logging import RunLog
from mindrlhf.utils.parallel import start
from mindrlhf.utils.progress import Progress
from mindrlhf.wrapper.generator import Generator
from mindrlhf.wrapper.objectives import PolicyObjective
from mindrlhf.wrapper.sampling import mix
from mindrlhf.wrapper.scorer import Scorer
from mindrlhf.wrapper.train_step import TrainStep

Update = list[PolicyBatch]  # the micro-batches of one optimizer step


class OnlineTrainer(Trainer):
    """A policy, its rewards and its prompts; `fit` runs the whole job, the methods below it are its parts."""

    def __init__(self, config: GRPOConfig, policy: Policy | None = None, rewards: Rewards | None = None):
        self.config = config
        _check(config)
        start()
        rollout = config.rollout
        self.algorithm = resolve(config.algorithm, rollout)
        self.rewards = rewards or Rewards.from_config(config.rewards, Path())
        self.policy = policy or open_policy(config.model, config.seed)
        decoder, self.tokenizer = self.policy.decoder, self.policy.tokenizer
        self.prompts = PromptDataset.read(
            config.data.train, config.data, self.tokenizer, rollout.max_prompt_tokens, Path()
        )
        self.held_out = PromptDataset.read(
            config.data.test, config.data, self.tokenizer, rollout.max_prompt_tokens, Path()
        )
        if not len(self.prompts):
            raise UserError("data.train: no file is named; online training needs prompts")
        sources = self.prompts.sources
        self.order = PromptOrder([len(s.keys) for s in sources], [s.probability for s in sources], config.seed)
        stop = self.policy.stop_ids(rollout.sampling.stop)
        self.generator = Generator(decoder, rollout.slots, rollout.max_prompt_tokens, rollout.sampling.max_tokens, stop)
        self.train_step = TrainStep(
            PolicyObjective(decoder, self.algorithm.loss), self.policy.trainable, config.optimizer
        )
        self.scorer: Scorer | None = None  # of the reference policy, where there is a KL to it
        self.rollouts: list[Rollout] = []
        self.experience: dict[str, float] = {}  # metrics of self.rollouts

    # -- one step ---------------------------------------------------------------------------------------------------

    def run_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        clock = time.time()
        self.make_experience()
        generated = time.time()
        dataset = self.make_dataset()
        scored = time.time()
        metrics = self.experience | self.train(self.train_step, dataset)
        now = time.time()
        tokens = sum(len(rollout.response_ids) for rollout in self.rollouts)
        metrics |= {
            "tokens_per_second": tokens / (now - clock),
            "seconds/experience": generated - clock,
            "seconds/reference": scored - generated,
            "seconds/train": now - scored,
        }
        every = self.config.logging.completions_every
        dump = every and self.step % every == 0
        return metrics, [self.describe(rollout) for rollout in self.rollouts[:8]] if dump else []

    def make_experience(self, num_generations: int | None = None, rank_id: int = 0) -> list[Rollout]:
        """Sample prompts_per_step groups with today's policy and reward them, into self.rollouts.

        num_generations: the config's where None. rank_id is the process's number; with one process it is 0.
        """
        if rank_id:
            raise UserError(f"rank_id {rank_id}: several processes are not supported yet; start one")
        rollout, algorithm = self.config.rollout, self.algorithm
        count = num_generations or rollout.num_generations
        rounds = self.config.algorithm.dynamic_sampling_max_rounds if algorithm.dynamic_sampling else 1
        self.generator.sync()
        kept: list[list[Rollout]] = []
        everything: list[Rollout] = []
        for number in range(rounds):
            missing = rollout.prompts_per_step - len(kept)
            prompts = [self.prompts[i] for i in self.order.take(missing)]
            seed = int(mix(self.config.seed, self.step, number))
            groups = self._groups(prompts, count, rollout.sampling, seed)
            everything += [answer for group in groups for answer in group]
            kept += [group for group in groups if not algorithm.dynamic_sampling or self._is_informative(group)]
            if len(kept) == rollout.prompts_per_step:
                break
        self.rollouts = [replace(answer, group=i) for i, group in enumerate(kept) for answer in group]
        self.experience = self._describe_all(everything) | {"groups": len(kept), "rounds": number + 1}
        self.generator.release()  # training needs the memory; the next sync writes all of it anew
        return self.rollouts

    def _groups(self, prompts: Sequence[Prompt], count: int, sampling: SamplingConfig, seed: int):
        """Rewarded answers, a list a prompt."""
        answers = self.generator.generate(prompts, count, sampling, seed)
        repeated = [prompt for prompt in prompts for _ in range(count)]
        totals, parts = self.rewards(repeated, self.texts(answers))
        buffer, factor = self.algorithm.overlong_buffer, self.config.algorithm.overlong_factor
        rewarded = []
        for i, answer in enumerate(answers):
            own = {name: float(values[i]) for name, values in parts.items()}
            if buffer:
                own["overlong"] = overlong_penalty(len(answer.response_ids), sampling.max_tokens, buffer, factor)
            reward = float(totals[i]) + own.get("overlong", 0.0)
            rewarded.append(replace(answer, reward=reward, reward_parts=own))
        return [rewarded[i : i + count] for i in range(0, len(rewarded), count)]

    def _is_informative(self, group: Sequence[Rollout]) -> bool:
        """By the first reward function, whose values dynamic sampling takes to lie in [0, 1]."""
        first = self.rewards.parts[0][0]
        return keep_group(np.array([rollout.reward_parts[first] for rollout in group]))

    def make_dataset(self) -> list[Update]:
        """self.rollouts as the optimizer steps of one pass: packed, scored by the reference, weighted."""
        return [self._update(chunk) for chunk in self._chunks()]

    def _chunks(self) -> list[list[Rollout]]:
        """The step's answers split into updates_per_epoch parts of whole groups. Advantages are the whole step's."""
        groups = sorted({rollout.group for rollout in self.rollouts})
        parts = np.array_split(groups, min(self.config.algorithm.updates_per_epoch, max(len(groups), 1)))
        return [[r for r in self.rollouts if r.group in set(part.tolist())] for part in parts if len(part)]

    def _update(self, rollouts: list[Rollout]) -> Update:
        sequences = [np.concatenate([r.prompt_ids, r.response_ids]) for r in rollouts]
        targets = [np.arange(len(ids)) >= len(r.prompt_ids) for ids, r in zip(sequences, rollouts, strict=True)]
        packing = Packing.of(sequences, targets, self.config.trainer.rows, self.row_tokens)
        # One engine: what was sampled is what the policy was, so the old log-probs are the sampled ones. Without a
        # reference the KL has weight 0 and its field holds them too.
        old = [rollout.sampled_logprobs for rollout in rollouts]
        ref = packing.collect(self.scorer.score(packing.batches)) if self.scorer else old
        counts = [len(rollout.response_ids) for rollout in rollouts]
        weights = loss_weights(counts, self.algorithm.aggregation, self.config.rollout.sampling.max_tokens)
        fields = {
            "loss_weight": [np.full(n, w, np.float32) for n, w in zip(counts, weights, strict=True)],
            "advantages": self._token_advantages(rollouts, ref),
            "old_logprobs": old,
            "ref_logprobs": ref,
        }
        spread = {name: packing.spread(values) for name, values in fields.items()}
        return [
            PolicyBatch(*rows, **{name: values[i] for name, values in spread.items()})
            for i, rows in enumerate(packing.batches)
        ]

    def _token_advantages(self, rollouts: Sequence[Rollout], ref: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One array [R] float32 an answer. Groups are whole in every chunk, so a chunk's baselines are the step's."""
        config, clip = self.config.algorithm, self.config.algorithm.reward_clip
        rewards = np.clip([rollout.reward for rollout in rollouts], -clip, clip)
        advantages = self.algorithm.advantage(rewards, np.array([r.group for r in rollouts]), config.advantage_epsilon)
        if not self.algorithm.kl_in_reward:
            counts = [len(rollout.response_ids) for rollout in rollouts]
            return [np.full(n, a, np.float32) for n, a in zip(counts, advantages, strict=True)]
        coefficient, estimator = self.algorithm.kl_coef, config.kl_estimator
        return [
            kl_shaped_advantages(a, rollout.sampled_logprobs, r, coefficient, estimator).astype(np.float32)
            for a, rollout, r in zip(advantages, rollouts, ref, strict=True)
        ]

    def train(self, train_step: TrainStep, dataset: list[Update]) -> dict[str, float]:
        """epochs_per_rollout passes over the updates: one step done.

        On the first update policy and old policy are the same, so mismatch_max, taken there, is the difference
        between generation and training.
        """
        config = self.config.algorithm
        results = []
        rate = learning_rate(
            self.step, self.total_steps(), config.learning_rate, config.schedule, config.warmup_steps,
            config.min_learning_rate_ratio,
        )  # fmt: skip
        for _ in range(config.epochs_per_rollout):
            results += [train_step(update, rate) for update in dataset]
        train_step.release()
        self.step += 1
        skipped = [result.skipped for result in results if result.skipped]
        metrics = {"learning_rate": rate, "skipped_updates": train_step.skipped}
        if skipped:
            metrics["skipped_tensor"] = skipped[0]
        if not results:  # dynamic sampling found no group to learn from
            return metrics
        tokens = max(sum(result.metrics["tokens"] for result in results), 1.0)
        for name in ("kl", "entropy", "clip_fraction", "policy_kl"):
            if name != "kl" or self.scorer:
                metrics[name] = sum(result.metrics[name] for result in results) / tokens
        metrics["mismatch_max"] = results[0].metrics["mismatch_max"]
        metrics["loss"] = mean([result.loss for result in results])
        metrics["gradient_norm"] = mean([result.gradient_norm for result in results])
        return metrics

    # -- the run ----------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        trainer = self.config.trainer
        return trainer.steps or trainer.epochs * len(self.prompts) // self.config.rollout.prompts_per_step

    def prepare(self, log: RunLog) -> None:
        if self.config.warmup.steps:
            self._warm_up(log)
        if self.algorithm.kl_coef:
            self.scorer = self._reference_scorer(fresh=True)

    def _reference_scorer(self, fresh: bool) -> Scorer:
        rollout = self.config.rollout
        longest = rollout.max_prompt_tokens + rollout.sampling.max_tokens
        return self.reference_scorer(fresh, longest, self.algorithm.loss.temperature)

    @property
    def starts_at_path(self) -> bool:
        return super().starts_at_path and not self.config.warmup.steps

    def _warm_up(self, log: RunLog) -> None:
        warmup, config = self.config.warmup, self.config
        if not warmup.train:
            raise UserError("warmup.train: no file is named; set it, or warmup.steps=0")
        training = TrainingConfig(warmup.batch_size, warmup.learning_rate, "cosine", warmup.warmup_steps)
        trainer = SFTTrainer(
            SFTConfig(
                seed=config.seed,
                data=replace(config.data, train=warmup.train, test=[]),
                training=training,
                optimizer=config.optimizer,
                trainer=TrainerConfig(steps=warmup.steps, rows=config.trainer.rows),
            ),
            self.policy,
        )
        with Progress(warmup.steps, 0, "warm-up", config.logging.progress) as progress:
            for number in range(1, warmup.steps + 1):
                metrics, _ = trainer.run_step()
                named = {f"warmup/{name}": metrics[name] for name in ("loss", "learning_rate", "gradient_norm")}
                log.log(0, {"warmup_step": number, **named})
                progress.update(named)

    def evaluate(self) -> dict[str, float]:
        """Greedy answers to the held-out problems: the mean of every reward part."""
        rows = self.config.trainer.evaluate_rows or len(self.held_out)
        prompts = [self.held_out[i] for i in range(min(rows, len(self.held_out)))]
        if not prompts:
            return {}
        self.generator.sync()
        greedy = SamplingConfig(temperature=0.0, max_tokens=self.config.rollout.sampling.max_tokens)
        groups = self._groups(prompts, 1, greedy, 0)
        self.evaluated = [group[0] for group in groups]
        return {name: mean([r.reward_parts[name] for r in self.evaluated]) for name in self.evaluated[0].reward_parts}

    def close(self, log: RunLog) -> dict[str, Any]:
        """Three held-out problems with their answers."""
        if not len(self.held_out):
            return {}
        if not getattr(self, "evaluated", None):
            self.evaluate()
        return {"samples": [self.describe(rollout) for rollout in self.evaluated[:3]]}

    def state(self) -> dict[str, Any]:
        return {"order": self.order.state(), "seed": self.config.seed}

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state["order"])
        if self.algorithm.kl_coef:
            self.scorer = self._reference_scorer(fresh=False)

    @property
    def row_tokens(self) -> int:
        """Width of a packed row."""
        rollout = self.config.rollout
        return self.config.trainer.row_tokens or rollout.max_prompt_tokens + rollout.sampling.max_tokens

    # -- what people read -------------------------------------------------------------------------------------------

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The answers as text, without special tokens."""
        return self.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        return {
            "prompt": self.tokenizer.decode(rollout.prompt_ids),
            "completion": self.tokenizer.decode(rollout.response_ids),
            "reward": round(rollout.reward, 4),
            "parts": {name: round(value, 4) for name, value in rollout.reward_parts.items()},
            "finished": rollout.finished,
        }

    def _describe_all(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        parts: Counter[str] = Counter()
        for rollout in rollouts:
            parts.update(rollout.reward_parts)
        count = max(len(rollouts), 1)
        return {
            "reward/total": mean([rollout.reward for rollout in rollouts]),
            **{f"reward/{name}": value / count for name, value in parts.items()},
            "response_tokens": mean([len(rollout.response_ids) for rollout in rollouts]),
            "finished": mean([rollout.finished for rollout in rollouts]),
            "answers": len(rollouts),
        }


def _check(config: GRPOConfig) -> None:
    """What no single field shows. Raises UserError."""
    rollout, algorithm, trainer = config.rollout, config.algorithm, config.trainer
    checks = (
        ("rollout.prompts_per_step", rollout.prompts_per_step, rollout.prompts_per_step > 0, "1 or more"),
        ("rollout.slots", rollout.slots, rollout.slots > 0, "1 or more"),
        ("rollout.max_prompt_tokens", rollout.max_prompt_tokens, rollout.max_prompt_tokens > 0, "1 or more"),
        ("rollout.sampling.temperature", rollout.sampling.temperature, rollout.sampling.temperature > 0,
         "over 0: greedy answers have no distribution to train on"),
        ("rollout.sampling.repetition_penalty", rollout.sampling.repetition_penalty,
         rollout.sampling.repetition_penalty == 1, "1: training would not know of the penalty"),
        ("model.lora.dropout", config.model.lora.dropout, config.model.lora.dropout == 0,
         "0: the ratio would not be 1 on policy"),
        ("algorithm.learning_rate", algorithm.learning_rate, algorithm.learning_rate > 0, "over 0"),
        ("algorithm.epochs_per_rollout", algorithm.epochs_per_rollout, algorithm.epochs_per_rollout > 0, "1 or more"),
        ("algorithm.updates_per_epoch", algorithm.updates_per_epoch, algorithm.updates_per_epoch > 0, "1 or more"),
        ("algorithm.warmup_steps", algorithm.warmup_steps, algorithm.warmup_steps >= 0, "0 (none) or more"),
    )  # fmt: skip
    check_numbers(config, checks)
    window = rollout.max_prompt_tokens + rollout.sampling.max_tokens
    if trainer.row_tokens and trainer.row_tokens < window:
        raise UserError(
            f"trainer.row_tokens: {trainer.row_tokens} is under rollout.max_prompt_tokens + max_tokens, {window}"
        )
