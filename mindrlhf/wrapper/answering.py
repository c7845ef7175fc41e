"""One call of a generator: which slot answers what, and what it has said so far."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindrlhf.config import SamplingConfig
from mindrlhf.types import Prompt, Rollout
from mindrlhf.wrapper.sampling import mix, uniforms


@dataclass(frozen=True, slots=True)
class Continuation:
    """How an answer goes on whose tokens so far are the end of a prompt's ids."""

    key: int  # `answer_key` of where it began
    offset: int  # its tokens so far
    limit: int  # tokens that it may still get


def answer_key(seed: int, prompt_key: int, sample: int) -> int:
    """uint64: what keys an answer's draws, the t-th with mix(key, t)."""
    return int(mix(seed, prompt_key, sample))


def first_samples(prompts: Sequence[Prompt], count: int) -> list[int]:
    """Number of each prompt's first sample: one that comes twice in a call gets other answers the second time."""
    seen: Counter[int] = Counter()
    first = []
    for prompt in prompts:
        first.append(seen[prompt.key] * count)
        seen[prompt.key] += 1
    return first


@dataclass
class _Task:
    """One answer that waits for a slot."""

    prompt: int  # index among those asked
    sample: int
    row: int  # of the prefilled batch


class Asked(NamedTuple):
    """A prompt that this rank answers."""

    number: int  # of the prompt among all of the call
    prompt: Prompt
    first: int  # number of its first sample


class Call:
    """The state of one `generate`: which slot answers what, and what it has said so far."""

    def __init__(
        self,
        generator: Any,
        asked: Sequence[Asked],
        num_generations: int,
        sampling: SamplingConfig,
        seed: int,
        on_token: Callable[[int, int], None] | None,
        continuations: Sequence[Continuation] | None,
    ):
        """generator: a Generator. The others as in its `generate`; continuations of the prompts in `asked`."""
        self.generator, self.asked, self.sampling, self.seed = generator, asked, sampling, seed
        self.num_generations, self.on_token, self.continuations = num_generations, on_token, continuations
        slots, vocabulary = generator.slots, generator.policy.config.vocab_size
        self.cell = generator._decode_cell(sampling)
        self.waiting_prompts = deque(range(len(asked)))
        self.waiting: deque[_Task] = deque()
        self.cached = ()  # keys and values of the prompts that self.waiting stands on
        self.task: list[_Task | None] = [None] * slots
        self.token = np.zeros(slots, np.int32)
        self.position = np.zeros(slots, np.int32)
        self.length = np.zeros(slots, np.int32)
        self.key = np.zeros(slots, np.uint64)
        self.offset = np.zeros(slots, np.int32)  # tokens of the answer from before this call
        self.limit = np.zeros(slots, np.int32)
        self.response = np.zeros((slots, sampling.max_tokens), np.int32)
        self.logprob = np.zeros((slots, sampling.max_tokens), np.float32)
        self.seen = np.zeros((slots, vocabulary) if "penalty" in self.cell.features else (1, 1), np.float32)
        self.done: dict[tuple[int, int], Rollout] = {}
        self.width = generator.prompt_width(max((len(one.prompt.ids) for one in asked), default=1))
        self.scalars = [
            Tensor(value, dtype)
            for value, dtype in (
                (sampling.temperature or 1.0, ms.float32),
                (sampling.top_k, ms.float32),
                (sampling.top_p, ms.float32),
                (sampling.min_p, ms.float32),
                (sampling.repetition_penalty, ms.float32),
            )
        ]

    def run(self) -> list[Rollout]:
        slots = self.generator.slots
        while self.waiting_prompts or self.waiting or any(self.task):
            free = [slot for slot in range(slots) if self.task[slot] is None]
            if len(free) >= self.generator.insert_rows:
                self._refill(free)
            self._step()
        keys = ((p, s) for p in range(len(self.asked)) for s in range(self.num_generations))
        return [self.done[key] for key in keys]

    def _refill(self, free: list[int]) -> None:
        while free and (self.waiting or self.waiting_prompts):
            if not self.waiting:
                self._prefill()
            count = min(len(free), len(self.waiting), self.generator.insert_rows)
            taken, free = free[:count], free[count:]
            tasks = [self.waiting.popleft() for _ in range(count)]
            self._insert(taken, tasks)

    def _prefill(self) -> None:
        """The next prompts, but for their last token, which the first decode step feeds."""
        rows, width = self.generator.prefill_rows, self.width
        taken = [self.waiting_prompts.popleft() for _ in range(min(rows, len(self.waiting_prompts)))]
        tokens, segments = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        for row, index in enumerate(taken):
            ids = self.asked[index].prompt.ids[:-1]
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
            self.waiting.extend(_Task(index, sample, row) for sample in range(self.num_generations))
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width)).copy()
        self.cached = self.generator._prefill(Tensor(tokens), Tensor(positions), Tensor(segments))
        self.generator.prefilled += len(taken)

    def _insert(self, slots: list[int], tasks: list[_Task]) -> None:
        generator, width = self.generator, self.width
        heads = generator.decoder.cache_heads
        # A graph of fixed shape: the last insertion repeated, which writes the same again.
        padding = generator.insert_rows - len(slots)
        target = np.array(slots + slots[-1:] * padding, np.int32)
        source = np.array([task.row for task in tasks] + [tasks[-1].row] * padding, np.int32)
        first = (target[:, None] * heads + np.arange(heads, dtype=np.int32)) * generator.length
        rows = (first[:, :, None] + np.arange(width, dtype=np.int32)).reshape(-1)
        generator._insert(Tensor(source), Tensor(rows), *self.cached)
        for slot, task in zip(slots, tasks, strict=True):
            _, prompt, first = self.asked[task.prompt]
            self.task[slot] = task
            self.token[slot], self.position[slot], self.length[slot] = prompt.ids[-1], len(prompt.ids) - 1, 0
            if self.continuations:
                going_on = self.continuations[task.prompt]
            else:
                key = answer_key(self.seed, prompt.key, first + task.sample)
                going_on = Continuation(key, 0, self.sampling.max_tokens)
            self.key[slot], self.offset[slot], self.limit[slot] = going_on.key, going_on.offset, going_on.limit
            if "penalty" in self.cell.features:
                self.seen[slot] = 0
                self.seen[slot, prompt.ids] = 1

    def _step(self) -> None:
        draw = uniforms(mix(self.key, self.offset + self.length))
        inputs = (self.token, self.position, draw)
        token, logprob = self.cell(*(Tensor(a) for a in inputs), *self.scalars, Tensor(self.seen))
        token, logprob = token.asnumpy(), logprob.asnumpy()
        self.generator.decode_steps += 1
        active = np.array([task is not None for task in self.task])
        rows = np.flatnonzero(active)
        self.response[rows, self.length[rows]] = token[rows]
        self.logprob[rows, self.length[rows]] = logprob[rows]
        self.token[rows] = token[rows]
        self.position[rows] += 1
        self.length[rows] += 1
        if "penalty" in self.cell.features:
            self.seen[rows, token[rows]] = 1
        if self.on_token:
            for task, known in zip((self.task[row] for row in rows), token[rows].tolist(), strict=True):
                self.on_token(self.asked[task.prompt].number * self.num_generations + task.sample, known)
        stopped = np.isin(token, self.generator.stop_ids)
        for slot in np.flatnonzero(active & (stopped | (self.length >= self.limit))):
            self._finish(slot, bool(stopped[slot]))

    def _finish(self, slot: int, finished: bool) -> None:
        task, count = self.task[slot], self.length[slot]
        self.done[task.prompt, task.sample] = Rollout(
            prompt_ids=self.asked[task.prompt].prompt.ids,
            response_ids=self.response[slot, :count].copy(),
            sampled_logprobs=self.logprob[slot, :count].copy(),
            finished=finished,
            group=self.asked[task.prompt].number,
        )
        self.task[slot] = None
        self.token[slot] = self.position[slot] = 0
