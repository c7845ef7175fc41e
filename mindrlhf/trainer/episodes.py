"""Answers that take several generations: turns with an environment, and answers carried over to the next step.

An episode's draws are keyed by where it began and by the number of its tokens, so its answer depends neither on the
batch nor on how often it was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mindrlhf.config import SamplingConfig
from mindrlhf.data.tokenizers import encode
from mindrlhf.environments import open_environment, take_turn
from mindrlhf.errors import UserError
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.parallel import from_main
from mindrlhf.wrapper.answering import Continuation, answer_key, first_samples
from mindrlhf.wrapper.generator import Generator


@dataclass
class Episode:
    """One answer in the making; the lists are over its R tokens so far."""

    prompt_ids: np.ndarray  # [P] int32, the text of the environment's reset included
    key: int  # of its draws
    group: int
    environment: Any = None  # it is stepped in the main process, and answers have it there only
    has_environment: bool = False
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # 0 where an environment wrote
    sampled: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)  # the environment's, each at the end of the turn that earned it
    ended: bool = False
    finished: bool = False  # ended by itself, not cut off

    def add(self, ids: Sequence[int], logprobs: Sequence[float], sampled: bool) -> None:
        self.response += ids
        self.logprobs += logprobs
        self.sampled += [sampled] * len(ids)
        self.rewards += [0.0] * len(ids)

    def end(self, finished: bool) -> None:
        self.ended, self.finished = True, finished

    def state(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "response": list(self.response),
            "logprobs": list(self.logprobs),
            "ended": self.ended,
            "finished": self.finished,
        }

    def rollout(self) -> Rollout:
        """sampled and token_rewards are None without an environment."""
        with_environment = self.has_environment
        return Rollout(
            prompt_ids=self.prompt_ids,
            response_ids=np.array(self.response, np.int32),
            sampled_logprobs=np.array(self.logprobs, np.float32),
            finished=self.finished,
            group=self.group,
            sampled=np.array(self.sampled, bool) if with_environment else None,
            token_rewards=np.array(self.rewards, np.float32) if with_environment else None,
        )


def play(
    generator: Generator,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    count: int,
    sampling: SamplingConfig,
    seed: int,
    make_environment: Callable[[], Any],
    max_turns: int,
) -> list[Rollout]:
    """count answers to each prompt, in the order of the prompts, each a conversation with its own environment.

    Rounds: every open answer generates its next turn, then the environments step. make_environment: called for every
    answer; the generator's stop_ids must include the environment's `stop`. An answer is finished where its environment
    said so; it is cut off (finished=False) after max_turns turns, or when its tokens, observations included, fill
    sampling.max_tokens; a turn that was cut is not shown to the environment. The last token is always a sampled one: an
    observation that nobody would answer is dropped.

    Raises UserError for mistakes of the environment, and what Generator.generate raises.
    """
    episodes, environments = [], []
    texts = iter(from_main(lambda: _opened(make_environment, prompts, count, environments)))
    for group, (prompt, first) in enumerate(zip(prompts, first_samples(prompts, count), strict=True)):
        for sample in range(first, first + count):
            text, environment = next(texts), environments[len(episodes)] if environments else None
            ids = np.concatenate([prompt.ids, *encode(tokenizer, [text] if text else [])])
            if len(ids) > generator.max_prompt_tokens:
                raise UserError(
                    f"prompt {prompt.key} and the text of the environment's reset have {len(ids)} tokens; the window "
                    f"takes 1 to {generator.max_prompt_tokens} (rollout.max_prompt_tokens)"
                )
            episodes.append(Episode(ids, answer_key(seed, prompt.key, sample), group, environment, True))
    for turn in range(1, max_turns + 1):
        going_on = [episode for episode in episodes if not episode.ended]
        came_to_end = _extend(generator, going_on, sampling, sampling.max_tokens)
        _step(tokenizer, came_to_end, sampling.max_tokens, turn == max_turns)
    return [episode.rollout() for episode in episodes]


def _opened(
    make_environment: Callable[[], Any], prompts: Sequence[Prompt], count: int, environments: list[Any]
) -> list[str]:
    """An environment for each answer, added to the list; returns what each says before the first turn."""
    opened = [open_environment(make_environment, prompt) for prompt in prompts for _ in range(count)]
    environments += [environment for environment, _ in opened]
    return [text for _, text in opened]


def _extend(generator: Generator, episodes: Sequence[Episode], sampling: SamplingConfig, most: int) -> list[tuple]:
    """At most `most` new tokens for each episode, which ends if it reaches sampling.max_tokens.

    Returns (episode, its new tokens) for those that met a stop token.
    """
    prompts, continuations = [], []
    for number, episode in enumerate(episodes):
        ids = np.concatenate([episode.prompt_ids, np.array(episode.response, np.int32)])
        prompts.append(Prompt(ids, "", None, number))
        so_far = len(episode.response)
        continuations.append(Continuation(episode.key, so_far, min(most, sampling.max_tokens - so_far)))
    stopped = []
    turns = generator.generate(prompts, 1, sampling, 0, continuations=continuations) if episodes else []
    for episode, turn in zip(episodes, turns, strict=True):
        episode.add(turn.response_ids.tolist(), turn.sampled_logprobs.tolist(), True)
        if turn.finished:
            stopped.append((episode, turn.response_ids))
        elif len(episode.response) == sampling.max_tokens:
            episode.end(finished=False)
    return stopped


def _step(tokenizer: Any, turns: Sequence[tuple], max_tokens: int, is_last: bool) -> None:
    """Show the turns to their environments and append what these say."""
    texts = tokenizer.batch_decode([ids for _, ids in turns], skip_special_tokens=True)
    said = from_main(
        lambda: [take_turn(episode.environment, text) for (episode, _), text in zip(turns, texts, strict=True)]
    )
    for (episode, _), (observation, reward, done) in zip(turns, said, strict=True):
        episode.rewards[-1] = reward
        ids = encode(tokenizer, [observation])[0].tolist() if observation else []
        if done or is_last or len(episode.response) + len(ids) >= max_tokens:
            episode.end(finished=done)
        else:
            episode.add(ids, [0.0] * len(ids), False)


class PartialRollouts:
    """Answers of which each step samples a part; what is unfinished goes on with the next step's weights.

    Partial rollouts of Kimi k1.5 (arXiv 2501.12599): long answers do not hold up the others. An answer's log-probs stay
    those of the weights that sampled each token. A group is handed out when all of its answers have ended.
    """

    def __init__(self, partial_tokens: int):
        """partial_tokens: sampled tokens an answer and step."""
        self.partial_tokens = partial_tokens
        self.groups: list[tuple[Prompt, list[Episode]]] = []  # unfinished ones, the oldest first

    def advance(
        self, generator: Generator, prompts: Sequence[Prompt], count: int, sampling: SamplingConfig, seed: int
    ) -> list[tuple[Prompt, list[Rollout]]]:
        """One step: begin `count` answers to each new prompt, go on with all, return the groups that are complete.

        A returned rollout's group is its place in the returned list; there may be none. Raises what
        Generator.generate raises.
        """
        for prompt, first in zip(prompts, first_samples(prompts, count), strict=True):
            keys = (answer_key(seed, prompt.key, sample) for sample in range(first, first + count))
            self.groups.append((prompt, [Episode(prompt.ids, key, 0) for key in keys]))
        going_on = [episode for _, group in self.groups for episode in group if not episode.ended]
        for episode, _ in _extend(generator, going_on, sampling, self.partial_tokens):
            episode.end(finished=True)
        complete, rest = [], []
        for prompt, group in self.groups:
            (complete if all(episode.ended for episode in group) else rest).append((prompt, group))
        self.groups = rest
        for number, (_, group) in enumerate(complete):
            for episode in group:
                episode.group = number
        return [(prompt, [episode.rollout() for episode in group]) for prompt, group in complete]

    def state(self) -> list[dict[str, Any]]:
        """The unfinished groups, for JSON; prompts by their key. Of now: an episode's lists grow in place."""
        return [
            {"prompt": prompt.key, "answers": [episode.state() for episode in group]} for prompt, group in self.groups
        ]

    def load_state(self, state: list[dict[str, Any]], prompts: Sequence[Prompt]) -> None:
        """The inverse of `state`; prompts[key] is the prompt of that key."""
        self.groups = []
        for saved in state:
            prompt = prompts[saved["prompt"]]
            group = []
            for answer in saved["answers"]:
                episode = Episode(prompt.ids, answer["key"], 0)
                episode.add(answer["response"], answer["logprobs"], True)
                episode.ended, episode.finished = answer["ended"], answer["finished"]
                group.append(episode)
            self.groups.append((prompt, group))


def describe(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Metrics of answers that had an environment: means over the answers, and the share of all tokens that it wrote.

    A turn is a run of sampled tokens, so two turns with an empty observation between them count as one.
    """
    masks = [rollout.is_sampled for rollout in rollouts]
    turns = [np.count_nonzero(np.diff(mask.astype(np.int8), prepend=0) == 1) for mask in masks]
    written = sum(int(np.count_nonzero(~mask)) for mask in masks)
    earned = [0.0 if rollout.token_rewards is None else float(rollout.token_rewards.sum()) for rollout in rollouts]
    count, tokens = max(len(rollouts), 1), max(sum(len(mask) for mask in masks), 1)
    return {
        "turns": sum(turns) / count,
        "environment_tokens": written / tokens,
        "environment_reward": sum(earned) / count,
    }
