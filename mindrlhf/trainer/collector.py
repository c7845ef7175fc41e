"""Where a step's answers come from: prompts drawn, groups sampled and rewarded, until there are enough of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.advantages import keep_group, overlong_penalty
from mindrlhf.config import OnlineConfig, SamplingConfig
from mindrlhf.data.prompts import PromptDataset, PromptOrder
from mindrlhf.environments import load_environment, stop_texts
from mindrlhf.errors import UserError
from mindrlhf.rewards import Rewards
from mindrlhf.rewards.remote import Background
from mindrlhf.trainer.algorithms import Resolved
from mindrlhf.trainer.episodes import PartialRollouts, describe, play
from mindrlhf.trainer.layouts import generation_layout
from mindrlhf.trainer.loop import mean
from mindrlhf.trainer.roles import Policy
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.memory import give_back
from mindrlhf.utils.parallel import from_main, is_main
from mindrlhf.utils.swap import Memory
from mindrlhf.wrapper.generator import Generator
from mindrlhf.wrapper.sampling import mix

Group = list[Rollout]  # the answers to one prompt


class Experience(NamedTuple):
    """What a step trains on."""

    rollouts: list[Rollout]  # of whole groups, numbered from 0
    metrics: dict[str, float]  # means over everything that was sampled for it


class Collector:
    """Draws prompts, samples `num_generations` answers to each and rewards them."""

    def __init__(
        self,
        config: OnlineConfig,
        algorithm: Resolved,
        policy: Policy,
        prompts: PromptDataset,
        rewards: Rewards | None,
        memory: Memory,
    ):
        """rewards: None where the environment's are all there are. memory: gets the roles that answers need."""
        rollout = config.rollout
        self.config, self.algorithm, self.policy = config, algorithm, policy
        self.prompts, self.rewards = prompts, rewards
        sources = prompts.sources
        self.order = PromptOrder([len(s.keys) for s in sources], [s.probability for s in sources], config.seed)
        self.make_environment = load_environment(rollout.environment, Path()) if rollout.environment else None
        self.partial = PartialRollouts(rollout.partial_tokens) if rollout.partial_tokens else None
        decoder, longest = policy.decoder, rollout.sampling.max_tokens
        layout = generation_layout(rollout.parallel, decoder.layout)
        layout.check(decoder.config, "rollout.parallel")
        self.generator = Generator(
            decoder, rollout.slots, rollout.max_prompt_tokens, longest, layout=layout, check_sync=rollout.check_sync
        )
        if self.rewards:  # functions and servers are asked once, models in every process
            self.rewards.once, self.rewards.asks = from_main, is_main()
        self.find_stop_ids()
        self.memory = memory
        self._add_roles()
        # Asynchronous rollouts: the next step's experience, and the rest of the state as it was before.
        self._pending: Background | None = None
        self._before_pending: dict[str, Any] = {}

    def _add_roles(self) -> None:
        generator, parts = self.generator, self.rewards.parts if self.rewards else ()
        weights, caches = generator.parameters, generator.caches
        scoring = [p for _, function, _ in parts for p in getattr(function, "parameters", ())]
        if self.config.rollout.asynchronous:  # needed all the time
            self.memory.add("generator", weights)
            self.memory.add("kv_cache", caches)
        else:
            self.memory.add("generator", weights, release=generator.release)
            self.memory.add("kv_cache", caches, release=lambda: give_back(caches))
        self.memory.add("reward_model", scoring, changing=())

    def _phase(self, name: str, *roles: str) -> AbstractContextManager[None]:
        """Of the memory. In a thread of its own a collector has none: what it needs stays."""
        return nullcontext() if self.config.rollout.asynchronous else self.memory.phase(name, *roles)

    def next(self, step: int, prompts_per_step: int, num_generations: int, more: bool) -> Experience:
        """A step's experience, with the policy as it is; asynchronously with the policy as it was a step before, and
        then the next step's is begun, if there will be `more`."""
        if not self.config.rollout.asynchronous:
            self.sync()
            return self._collect(step, prompts_per_step, num_generations)
        pending, self._pending = self._pending, None
        if pending is None:
            self.sync()
            experience = self._collect(step, prompts_per_step, num_generations)
        else:
            experience = pending.result()
        if more:
            self.sync()
            self._before_pending = self._drawn()
            self._pending = Background(self._collect, step + 1, prompts_per_step, num_generations)
        return experience

    def sync(self, weights: Callable[[str], np.ndarray] | None = None) -> None:
        """Generate with these weights from now on, by default with the policy's; what is being generated ends first."""
        if self._pending:
            self._pending.error()
        with self._phase("sync", "policy", "generator"):
            self.generator.sync(weights)

    def find_stop_ids(self) -> None:
        """What ends an answer, or a turn: the policy's own tokens, the config's and the environment's."""
        turn_ends = stop_texts(self.make_environment) if self.make_environment else ()
        ids = self.policy.stop_ids([*self.config.rollout.sampling.stop, *turn_ends])
        self.generator.stop_ids = np.array(sorted(ids), np.int32)

    def _collect(self, step: int, prompts_per_step: int, num_generations: int) -> Experience:
        """`step` and the config's seed key the sampling."""
        algorithm, kept, everything = self.algorithm, [], []
        rounds = self.config.algorithm.dynamic_sampling_max_rounds if algorithm.dynamic_sampling else 1
        for number in range(rounds):
            prompts = [self.prompts[i] for i in self.order.take(prompts_per_step - len(kept))]
            seed = int(mix(self.config.seed, step, number))
            if self.partial:
                prompts, groups = self._advanced(prompts, num_generations, seed)
            else:
                groups = self.groups(prompts, num_generations, self.config.rollout.sampling, seed)
            everything += [answer for group in groups for answer in group]
            if algorithm.row.needs == "greedy":
                groups = self._with_greedy_rewards(prompts, groups)
            kept += [group for group in groups if not algorithm.dynamic_sampling or self._is_informative(group)]
            if len(kept) == prompts_per_step:
                break
        rollouts = [replace(answer, group=i) for i, group in enumerate(kept) for answer in group]
        metrics = describe_all(everything) | {"groups": len(kept), "rounds": number + 1}
        return Experience(rollouts, metrics | (describe(everything) if self.make_environment else {}))

    def groups(self, prompts: Sequence[Prompt], count: int, sampling: SamplingConfig, seed: int) -> list[Group]:
        """`count` rewarded answers to each prompt."""
        turns, tokenizer = self.config.rollout.max_turns, self.policy.tokenizer
        with self._phase("generate", "generator", "kv_cache"):
            if self.make_environment:
                answers = play(self.generator, tokenizer, prompts, count, sampling, seed, self.make_environment, turns)
            else:
                answers = self.generator.generate(prompts, count, sampling, seed)
        return self._rewarded_groups(prompts, count, answers, sampling.max_tokens)

    def _advanced(self, prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Group]]:
        """Begins answers to the prompts and goes on with unfinished ones: the prompts and groups that got complete."""
        sampling = self.config.rollout.sampling
        with self._phase("generate", "generator", "kv_cache"):
            complete = self.partial.advance(self.generator, prompts, count, sampling, seed)
        begun = [prompt for prompt, _ in complete]
        answers = [answer for _, group in complete for answer in group]
        return begun, self._rewarded_groups(begun, count, answers, sampling.max_tokens)

    def _rewarded_groups(
        self, prompts: Sequence[Prompt], count: int, answers: Sequence[Rollout], max_tokens: int
    ) -> list[Group]:
        answers = self._rewarded([prompt for prompt in prompts for _ in range(count)], answers, max_tokens)
        return [answers[i : i + count] for i in range(0, len(answers), count)]

    def _rewarded(self, prompts: Sequence[Prompt], answers: Sequence[Rollout], max_tokens: int) -> list[Rollout]:
        if not answers:
            return []
        with self._phase("rewards", "generator", "reward_model"):  # the generator may have to go on
            totals, parts = self.rewards(prompts, self.texts(answers)) if self.rewards else (np.zeros(len(answers)), {})
        config, rewarded = self.config.algorithm, []
        for i, answer in enumerate(answers):
            own = {name: float(values[i]) for name, values in parts.items()}
            added = {}
            if self.algorithm.overlong_buffer:
                length, buffer = len(answer.response_ids), self.algorithm.overlong_buffer
                added["overlong"] = overlong_penalty(length, max_tokens, buffer, config.overlong_factor)
            if config.missing_stop_penalty:
                added["missing_stop"] = 0.0 if answer.finished else -config.missing_stop_penalty
            if answer.token_rewards is not None:
                added["environment"] = float(answer.token_rewards.sum())
            reward = float(totals[i]) + sum(added.values())
            rewarded.append(replace(answer, reward=reward, reward_parts=own | added))
        return rewarded

    def _with_greedy_rewards(self, prompts: Sequence[Prompt], groups: list[Group]) -> list[Group]:
        greedy = SamplingConfig(temperature=0.0, max_tokens=self.config.rollout.sampling.max_tokens)
        baselines = self.groups(prompts, 1, greedy, 0)
        return [
            [replace(answer, greedy_reward=baseline.reward) for answer in group]
            for group, (baseline,) in zip(groups, baselines, strict=True)
        ]

    def _is_informative(self, group: Sequence[Rollout]) -> bool:
        """By the first part, whose values dynamic sampling takes to lie in [0, 1]."""
        scores = np.array([rollout.reward_parts[self.first_part] for rollout in group])
        if not ((scores >= 0) & (scores <= 1)).all():
            wrong = scores[(scores < 0) | (scores > 1)][0]
            raise UserError(
                f"algorithm.dynamic_sampling: takes the first reward to lie in [0, 1], and {self.first_part} gave "
                f"{wrong:g}; put one that does first, or switch it off"
            )
        return keep_group(scores)

    @property
    def first_part(self) -> str:
        """The part of the reward that says whether an answer is right."""
        return self.rewards.parts[0][0] if self.rewards else "environment"

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """The answers as text, without special tokens."""
        return self.policy.tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)

    def state(self) -> dict[str, Any]:
        """JSON-able: where the order of the prompts stands, unfinished answers, and experience that no step has trained
        on yet."""
        if self._pending is None:
            return self._drawn()
        if self._pending.error():  # which is raised where the experience is asked for
            return self._before_pending
        rollouts, metrics = self._pending.result()
        return self._drawn() | {"pending": [[rollout.state() for rollout in rollouts], metrics]}

    def _drawn(self) -> dict[str, Any]:
        state = {"order": self.order.state()}
        return state | ({"partial": self.partial.state()} if self.partial else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.order.load_state(state["order"])
        if self.partial:
            self.partial.load_state(state["partial"], self.prompts)
        if "pending" in state:
            rollouts, metrics = state["pending"]
            experience = Experience([Rollout.from_state(rollout) for rollout in rollouts], metrics)
            self._pending = Background(lambda: experience)


def describe_all(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the answers, for the metrics."""
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
