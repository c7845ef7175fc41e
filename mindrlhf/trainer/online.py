"""Online training: sample answers, reward them, train on them. One loop for every row of the algorithms' table."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mindspore import nn

from mindrlhf.advantages import adaptive_kl_coef
from mindrlhf.config import OnlineConfig, TrainerConfig, TrainingConfig
from mindrlhf.data.packing import Packing
from mindrlhf.data.prompts import PromptDataset
from mindrlhf.errors import UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.rewards import Rewards
from mindrlhf.schedules import learning_rate
from mindrlhf.trainer.algorithms import resolve
from mindrlhf.trainer.checks import check_online
from mindrlhf.trainer.collector import Collector
from mindrlhf.trainer.credit import Credit, Scores, assign, mismatch_metrics
from mindrlhf.trainer.held_out import answer_kl, evaluate_greedy, evaluate_kl, evaluate_sampled
from mindrlhf.trainer.layouts import scoring_layout, training_layout
from mindrlhf.trainer.loop import Trainer, check_rank, mean, prefixed
from mindrlhf.trainer.offline import TRAIN
from mindrlhf.trainer.reward_parts import open_rewards
from mindrlhf.trainer.roles import Policy, open_policy
from mindrlhf.trainer.supervised import pretraining_stage, stage_on
from mindrlhf.trainer.updates import Update, chunks, make_update, pack
from mindrlhf.types import PolicyBatch, Rollout
from mindrlhf.utils.logging import RunLog
from mindrlhf.utils.parallel import is_main
from mindrlhf.utils.progress import Progress
from mindrlhf.utils.swap import Memory
from mindrlhf.wrapper.balance import Balancer
from mindrlhf.wrapper.loss_scale import LossScale
from mindrlhf.wrapper.policy_objectives import PolicyObjective
from mindrlhf.wrapper.scorer import Scorer
from mindrlhf.wrapper.train_step import StepResult, TrainStep
from mindrlhf.wrapper.weight_average import WeightAverage


class OnlineTrainer(Trainer):
    """A policy, its rewards and its prompts; `fit` runs the whole job, the methods below it are its parts."""

    config: OnlineConfig
    batch_types: tuple[type, type | None] = (PolicyBatch, None)  # of the policy's train step, and of the critic's

    def __init__(self, config: OnlineConfig, policy: Policy | None = None, rewards: Rewards | None = None):
        self.config = config
        layout = policy.decoder.layout if policy else training_layout(config)
        self.algorithm = resolve(config.algorithm, config.rollout)
        check_online(config, self.algorithm.dynamic_sampling)
        if rewards is None and (config.rewards or not config.rollout.environment):
            rewards = open_rewards(config.rewards, Path(), scoring_layout(layout))
        self.policy = policy or open_policy(config.model, config.seed, layout=layout)
        self.prompts, self.held_out = self._read(config.data.train), self._read(config.data.test)
        if not len(self.prompts):
            raise UserError("data.train: no file is named; online training needs prompts")
        self.pretraining = pretraining_stage(config, self.policy)  # first: its rows may bring a stop token
        self.memory = Memory(config.memory)
        self.collector = Collector(config, self.algorithm, self.policy, self.prompts, rewards, self.memory)
        decoder, auxiliary = self.policy.decoder, self.pretraining and self.pretraining.objective
        self.train_step = TrainStep(
            self.make_objective(), self.trained_parameters(), config.optimizer, auxiliary=auxiliary,
            shard=decoder.shard, balancer=Balancer.of(decoder, config.model.balance), loss_scale=LossScale.of(decoder),
        )  # fmt: skip
        if (decay := config.algorithm.ema_decay) and decoder.lora:
            raise UserError("algorithm.ema_decay: must be 0 with adapters: the average is of whole weights")
        self.average = WeightAverage(self.policy.trainable, decay, self.policy.decoder.shard) if decay else None
        self._scorer: Scorer | None = None
        self.old_scorer = Scorer(self.policy.decoder, self.algorithm.loss.temperature)
        self.kl_coef = self.algorithm.kl_coef
        self.rollouts: list[Rollout] = []
        self.experience: dict[str, float] = {}  # metrics of self.rollouts
        self._add_roles()

    def _add_roles(self) -> None:
        """What is trained. With swap it leaves here, so the policy comes last: the others are made from it."""
        add, step, trained = self.memory.add, self.train_step, self.trained_parameters()
        add("policy_optimizer", step.moments)
        add("policy_gradients", step.gradients, release=step.release)
        if self.average:
            add("average", self.average.averages)
        every = {id(parameter): parameter for parameter in (*self.policy.decoder.get_parameters(), *trained)}
        add("policy", list(every.values()), changing=[*trained, *step.biases])

    @property
    def scorer(self) -> Scorer | None:
        """Of the reference policy, where there is a KL to it."""
        return self._scorer

    @scorer.setter
    def scorer(self, scorer: Scorer | None) -> None:
        self._scorer = scorer
        self.memory.add("reference", list(scorer.decoder.get_parameters()) if scorer else [], changing=())

    def _read(self, sources) -> PromptDataset:
        config = self.config
        return PromptDataset.read(sources, config.data, self.policy.tokenizer, config.rollout.max_prompt_tokens, Path())

    # What a trainer with a critic says otherwise.

    def make_objective(self) -> nn.Cell:
        return PolicyObjective(self.policy.decoder, self.algorithm.loss)

    def trained_parameters(self) -> list:
        """By the policy's train step."""
        return self.policy.trainable

    def values(self, packings: Sequence[Packing], rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """The critic's, [S] an answer; zeros without a critic. The packings hold the rollouts in their order."""
        return [np.zeros(int(rollout.is_sampled.sum()), np.float32) for rollout in rollouts]

    def train_once(self, train_step: TrainStep, update: Update, rate: float) -> StepResult | None:
        """One optimizer step of everything that is trained; None where the policy is not."""
        return train_step(update.policy, rate, self._pretraining_batches())

    # -- one step ---------------------------------------------------------------------------------------------------

    def run_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        clock = time.time()
        self.memory.start_step()
        self.make_experience()
        generated = time.time()
        dataset = self.make_dataset()
        scored = time.time()
        metrics = self.train(self.train_step, dataset)
        now = time.time()
        tokens = sum(len(rollout.response_ids) for rollout in self.rollouts)
        metrics = self.experience | metrics | self.memory.finish_step() | {
            "tokens_per_second": tokens / (now - clock),
            "seconds/experience": generated - clock,
            "seconds/scores": scored - generated,
            "seconds/train": now - scored,
        }  # fmt: skip
        every = self.config.logging.completions_every
        dump = every and self.step % every == 0
        return metrics, [self.describe(rollout) for rollout in self.rollouts[:8]] if dump else []

    def make_experience(
        self, num_generations: int | None = None, rank_id: int = 0, num_rollouts: int | None = None
    ) -> list[Rollout]:
        """Sample and reward the step's groups, into self.rollouts.

        num_generations: answers a prompt, num_rollouts: answers a step, rounded up to whole groups; the config's where
        None. rank_id is the process's number. All processes call it, and get all answers.
        """
        check_rank(rank_id)
        rollout = self.config.rollout
        count = num_generations or rollout.num_generations
        prompts = -(-num_rollouts // count) if num_rollouts else rollout.prompts_per_step
        more = self.step + 1 < self.total_steps()
        self.rollouts, self.experience = self.collector.next(self.step, prompts, count, more)
        return self.rollouts

    def make_dataset(self) -> list[Update]:
        """self.rollouts as the optimizer steps of one pass: packed, scored by every model, with advantages.

        Advantages are the whole step's, weights those of each optimizer step.
        """
        config, algorithm = self.config, self.algorithm
        parts = chunks(self.rollouts, config.algorithm.updates_per_epoch)
        packings = [pack(part, config, self.policy.decoder.layout) for part in parts]
        scores = self._score(parts, packings)
        rollouts = [rollout for part in parts for rollout in part]
        credit = assign(rollouts, scores, algorithm, config.algorithm, self.kl_coef)
        self.experience |= self.describe_scores(scores, credit)
        updates, first = [], 0
        for part, packing in zip(parts, packings, strict=True):
            span = slice(first, first + len(part))
            own = Scores(*(field[span] for field in scores)), Credit(*(field[span] for field in credit))
            longest = config.rollout.sampling.max_tokens
            updates.append(make_update(packing, *own, algorithm.aggregation, longest, self.batch_types))
            first = span.stop
        return updates

    def _score(self, parts: Sequence[list[Rollout]], packings: Sequence[Packing]) -> Scores:
        """Without rescoring, what generation saw is what the policy was: on one engine they are the same. Without a
        reference the KL has weight 0 and its field holds the old log-probs."""
        if self.needs_reference and self.scorer is None:  # a program's own loop: nobody has called `prepare`
            with self.memory.phase("start", "policy"):
                self.scorer = self.copy_scorer(self.algorithm.loss.temperature)
        rollouts = [rollout for part in parts for rollout in part]
        old = ref = sampled = [rollout.sampled_logprobs[rollout.is_sampled] for rollout in rollouts]
        if self.algorithm.rescore:
            with self.memory.phase("score policy", "policy"):
                old = ref = _logprobs(self.old_scorer, packings)
        if self.scorer:
            with self.memory.phase("score reference", "reference"):
                ref = _logprobs(self.scorer, packings)
        return Scores(sampled, old, ref, self.values(packings, rollouts))

    def describe_scores(self, scores: Scores, credit: Credit) -> dict[str, float]:
        """Metrics of a step's scores and advantages."""
        metrics = mismatch_metrics(scores) if self.algorithm.rescore else {}
        if self.scorer:
            metrics |= {"kl_per_answer": answer_kl(scores.old, scores.ref), "kl_coef": self.kl_coef}
        return metrics

    def train(self, train_step: TrainStep, dataset: list[Update], epoch: int | None = None) -> dict[str, float]:
        """epochs_per_rollout passes over the updates: one step done. epoch is the published program's own count.

        On the first update policy and old policy are the same, so where the old log-probs are those of generation,
        the shift measured there is the difference between generation and training.
        """
        config = self.config.algorithm
        rate = self.rate(config.learning_rate, self.first_policy_step)
        results = []
        with self.memory.phase("train policy", "policy", "policy_optimizer", "policy_gradients", "average"):
            for update in dataset * config.epochs_per_rollout:
                results.append(self.train_once(train_step, update, rate))
                if self.average:
                    self.average.update()
        self.step += 1
        if config.kl_target and self.scorer and any(results):
            kl = self.experience["kl_per_answer"]
            self.kl_coef = adaptive_kl_coef(self.kl_coef, kl, config.kl_target, config.kl_horizon, len(self.rollouts))
        return self.describe_training([result for result in results if result], rate)

    first_policy_step = 0  # of those that train the policy

    def rate(self, peak: float, first: int = 0) -> float:
        """This step's learning rate, of a schedule that begins at step `first`."""
        config = self.config.algorithm
        step, total = max(self.step - first, 0), max(self.total_steps() - first, 1)
        return learning_rate(step, total, peak, config.schedule, config.warmup_steps, config.min_learning_rate_ratio)

    def describe_training(self, results: list[StepResult], rate: float) -> dict[str, float]:
        """Metrics of a step's updates of the policy."""
        metrics = {"learning_rate": rate, "skipped_updates": self.train_step.skipped}
        skipped = [result.skipped for result in results if result.skipped]
        if skipped:
            metrics["skipped_tensor"] = skipped[0]
        if not results:  # dynamic sampling found no group to learn from, or the critic warms up
            return metrics
        tokens = max(sum(result.metrics["tokens"] for result in results), 1.0)
        for name in ("kl", "entropy", "clip_fraction", "policy_kl"):
            if name != "kl" or self.scorer:
                metrics[name] = sum(result.metrics[name] for result in results) / tokens
        if not self.algorithm.rescore:
            first = results[0].metrics
            metrics |= {"mismatch_mean": first["shift"] / max(first["tokens"], 1.0), "mismatch_max": first["shift_max"]}
        if self.pretraining:
            metrics["pretraining_loss"] = mean([result.metrics["auxiliary/loss"] for result in results])
        metrics |= {name: mean([result.routing[name] for result in results]) for name in results[0].routing}
        metrics |= {name: mean([getattr(result, name) for result in results]) for name in ("loss", "gradient_norm")}
        return metrics

    def _pretraining_batches(self) -> list[NamedTuple]:
        """PPO-ptx: rows of the supervised data, their loss times pretraining.coef."""
        if not self.pretraining:
            return []
        config = self.config.pretraining
        rows = self.pretraining.batches(TRAIN, self.pretraining.order.take(config.batch_size))
        return [batch._replace(loss_weight=batch.loss_weight * np.float32(config.coef)) for batch in rows]

    # -- the run ----------------------------------------------------------------------------------------------------

    def total_steps(self) -> int:
        trainer = self.config.trainer
        return trainer.steps or max(trainer.epochs * len(self.prompts) // self.config.rollout.prompts_per_step, 1)

    def prepare(self, log: RunLog) -> None:
        if self.config.warmup.steps:
            with self.memory.phase("warm-up", "policy"):
                self._warm_up(log)
        with self.memory.phase("start", "policy", "average", "critic"):
            self.warmed_up()
        if self.needs_reference and self.scorer is None:
            with self.memory.phase("start", "policy"):
                self.scorer = self._reference_scorer(fresh=True)

    def warmed_up(self) -> None:
        """The policy is as online training begins with it; what copies it does so now."""
        self.collector.find_stop_ids()  # the warm-up's rows may have brought one
        if self.average:
            self.average.restart()

    @property
    def needs_reference(self) -> bool:
        return self.algorithm.kl_coef > 0 or self.config.evaluation.kl

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
        trainer = stage_on(config, self.policy, warmup.train, training, TrainerConfig(steps=warmup.steps))
        with Progress(warmup.steps, 0, "warm-up", config.logging.progress) as progress:
            for number in range(1, warmup.steps + 1):
                metrics, _ = trainer.run_step()
                named = {f"warmup/{name}": metrics[name] for name in ("loss", "learning_rate", "gradient_norm")}
                log.log(0, {"warmup_step": number, **named})
                progress.update(named)

    def evaluate(self) -> dict[str, float]:
        """On the held-out problems, as the config's evaluation section says; empty where there are none."""
        rows = self.config.trainer.evaluate_rows or len(self.held_out)
        prompts = [self.held_out[i] for i in range(min(rows, len(self.held_out)))]
        if not prompts:
            return {}
        collector, evaluation = self.collector, self.config.evaluation
        collector.sync()
        values, self.evaluated = evaluate_greedy(collector, prompts)
        if evaluation.num_generations > 1:
            values |= evaluate_sampled(collector, prompts)
        if evaluation.kl:
            values |= evaluate_kl(collector, prompts, self.scorer, self.kl_coef)
        if self.average:
            with self.memory.phase("sync", "policy", "average"):
                collector.sync(self.average.over(self.policy.decoder.own_weights))
            averaged, _ = evaluate_greedy(collector, prompts)
            values |= {f"average/{name}": value for name, value in averaged.items()}
        return values

    def close(self, log: RunLog) -> dict[str, Any]:
        """Three held-out problems with their answers."""
        if is_main():
            self.memory.write(self.output)
        samples = self._samples()
        with self.memory.phase("end", "policy"):  # for whoever goes on with it
            return samples

    def _samples(self) -> dict[str, Any]:
        if not len(self.held_out):
            return {}
        if not getattr(self, "evaluated", None):
            self.evaluate()
        return {"samples": [self.describe(rollout) for rollout in self.evaluated[:3]]}

    def describe(self, rollout: Rollout) -> dict[str, Any]:
        """An answer for people to read."""
        return {
            "prompt": self.policy.tokenizer.decode(rollout.prompt_ids),
            "completion": self.policy.tokenizer.decode(rollout.response_ids),
            "reward": round(rollout.reward, 4),
            "parts": {name: round(value, 4) for name, value in rollout.reward_parts.items()},
            "finished": rollout.finished,
        }

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state = {**self.collector.state(), "seed": self.config.seed, "kl_coef": self.kl_coef}
        return state | ({"pretraining": self.pretraining.state()} if self.pretraining else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.collector.load_state(state)
        self.kl_coef = state["kl_coef"]
        if self.pretraining:
            self.pretraining.load_state(state["pretraining"])
        if self.needs_reference and self.scorer is None:
            self.scorer = self._reference_scorer(fresh=False)

    def load(self, directory: Path) -> None:
        with self.memory.phase("load", "policy"):
            super().load(directory)
        self.collector.find_stop_ids()

    def write(self, directory: Path) -> None:
        with self.memory.phase("checkpoint", "policy", "average"):
            super().write(directory)
            if self.average:
                decoder = self.policy.decoder
                own = self.average.over(decoder.own_weights)
                averaged = Decoder(
                    decoder.config, lambda name: decoder.shard.whole(name, own(name)), layout=decoder.layout
                )
                replace(self.policy, decoder=averaged).write(directory / "average")

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        # All at once: they are written, from where they are, after the last has been named.
        with self.memory.phase("checkpoint", "policy_optimizer", "critic_optimizer", "average"):
            yield from super().tensors()
            if self.average:
                yield from prefixed("average", self.average.state())

    def load_tensors(self, read: Callable[[str], np.ndarray], state: dict[str, Any]) -> None:
        with self.memory.phase("load", "policy_optimizer", "average"):
            super().load_tensors(read, state)
            if self.average:
                self.average.load_state(lambda name: read(f"average.{name}"))


def _logprobs(scorer: Scorer, packings: Sequence[Packing]) -> list[np.ndarray]:
    """Of every answer in the packings, [S] float32."""
    return [found for packing in packings for found in packing.collect(scorer.score(packing.batches))]
