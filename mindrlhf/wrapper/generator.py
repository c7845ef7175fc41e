"""Incremental inference: prompts to answers, with a KV cache and slots that are refilled as answers finish.

Three graphs, each of a fixed shape: prefill (a batch of prompts to keys and values), insert (those into the slots'
caches, one prompt to all of its answers) and decode (one token for every slot). The first token of an answer comes
from the decode graph too, fed with the prompt's last token, so every sampled token takes the same path.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.models import kernels
from mindrlhf.models.decoder import Decoder, Weights
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.memory import give_back
from mindrlhf.wrapper.graph import Graph
from mindrlhf.wrapper.sampling import check_sampling, mix, next_token, uniforms


class _Prefill(Graph):
    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments):
        return self.decoder.prefill(tokens, positions, segments)


class _Insert(Graph):
    """Keys and values of prefilled prompts into the caches of slots."""

    def __init__(self, caches):
        super().__init__(auto_prefix=False)
        self.caches = ms.ParameterTuple(caches)
        self.scatter_update = ops.ScatterUpdate()

    def construct(self, source, rows, *cached):
        """source [n] int32: which prompt; rows [n*Hkv*P] int32: where in the cache; cached: [B, Hkv, P, D] each."""
        done = ()
        for i in range(len(self.caches)):
            width = cached[i].shape[3]
            values = ops.gather(cached[i], source, 0).reshape(-1, width)
            done = done + (self.scatter_update(self.caches[i], rows, values)[0, 0],)
        return done


class _Decode(Graph):
    """One token for every slot."""

    def __init__(self, decoder: Decoder, caches, slots: int, length: int, features: tuple[str, ...]):
        super().__init__(auto_prefix=False)
        self.decoder = decoder
        self.key_caches = ms.ParameterTuple(caches[0::2])
        self.value_caches = ms.ParameterTuple(caches[1::2])
        self.kv_heads = decoder.config.num_kv_heads
        self.first_row = Tensor(np.arange(slots * self.kv_heads, dtype=np.int32)[None] * length).reshape(slots, -1)
        self.range = Tensor(np.arange(length, dtype=np.int32)[None])
        self.features = features
        # MindSpore's name for a cell whose inputs never change in shape: after its first call it skips the checks of
        # all child cells, 1 ms a step.
        self.phase = "increment"

    def construct(self, tokens, positions, uniform, temperature, top_k, top_p, min_p, penalty, seen):
        rows = (self.first_row + positions.expand_dims(1)).reshape(-1)
        mask = (ops.cast(self.range > positions.expand_dims(1), ms.float32) * kernels.MASKED).expand_dims(1)
        hidden = self.decoder.decode(tokens, positions, rows, mask, self.key_caches, self.value_caches)
        logits = self.decoder.logits(hidden)
        if "penalty" in self.features:
            factor = ops.select(logits > 0, 1.0 / penalty * ops.ones_like(logits), penalty * ops.ones_like(logits))
            logits = logits + seen * (logits * factor - logits)
        return next_token(logits, uniform, temperature, top_k, top_p, min_p, self.features)


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

    prompt: int  # index in the call
    sample: int
    row: int  # of the prefilled batch


class Generator:
    """Answers prompts with a decoder of its own.

    policy: the decoder that is trained; `sync` copies its weights. slots: answers decoded at the same time.
    max_prompt_tokens and max_tokens: what the caches hold, fixed so that nothing recompiles. stop_ids: tokens that
    end an answer; they stay in it. least_width: prompts are padded to it times a power of two, and every width is
    compiled once.
    """

    def __init__(
        self,
        policy: Decoder,
        slots: int,
        max_prompt_tokens: int,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        least_width: int = 8,
    ):
        self.policy, self.slots, self.stop_ids = policy, slots, np.array(sorted(stop_ids), np.int32)
        self.max_prompt_tokens, self.max_tokens, self.least_width = max_prompt_tokens, max_tokens, least_width
        # Prompts a prefill; fixed, so that one graph serves any number of them.
        self.prefill_rows = min(8, slots)
        self.insert_rows = max(1, slots // 8)  # slots an insertion: it costs about as much as a decode step
        self.length = math.ceil((max_prompt_tokens + max_tokens) / 64) * 64
        config = policy.config
        if max_prompt_tokens + max_tokens > config.max_positions:
            raise UserError(
                f"max_prompt_tokens {max_prompt_tokens} + max_tokens {max_tokens} is over the model's window of "
                f"{config.max_positions} positions (max_position_embeddings); lower one of them"
            )
        self.length = min(self.length, config.max_positions)
        self.decoder = Decoder(config, policy.weights, transposed=True)
        shape = (slots * config.num_kv_heads * self.length, config.head_dim)
        self._caches = [
            Parameter(Tensor(np.zeros(shape, np.float32)), name=f"cache.{layer}.{kind}", requires_grad=False)
            for layer in range(config.num_layers)
            for kind in ("key", "value")
        ]
        self._prefill = _Prefill(self.decoder)
        self._insert = _Insert(self._caches)
        self._decode: dict[tuple[str, ...], _Decode] = {}
        self._released = False
        self.decode_steps = 0  # decode graphs run so far, for benchmarks and tests of slot use
        self.prefilled = 0  # prompts prefilled so far

    def sync(self, weights: Weights | None = None) -> None:
        """Copy weights in, laid out for decoding; by default the policy's."""
        self.decoder.load(weights or self.policy.weights)
        self._released = False

    def release(self) -> None:
        """Give back the memory of weights and caches until the next `sync`."""
        give_back([*self.decoder.get_parameters(), *self._caches])
        self._released = True

    @property
    def caches(self) -> list[Parameter]:
        """Keys and values of the slots; every call of `generate` writes what it reads."""
        return self._caches

    def prompt_width(self, tokens: int) -> int:
        """Width that prompts of at most so many tokens are padded to: few shapes, few compilations."""
        width = self.least_width
        while width < tokens:
            width *= 2
        return min(width, self.length)

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_generations: int,
        sampling: SamplingConfig,
        seed: int,
        on_token: Callable[[int, int], None] | None = None,
        continuations: Sequence[Continuation] | None = None,
    ) -> list[Rollout]:
        """num_generations answers to each prompt, in the order of the prompts; group is the prompt's index here.

        on_token: called with (number of the answer in the returned list, token id) as soon as a token is known. What
        it raises ends the call; the generator stays fit for the next one, and so it does after Ctrl-C.
        continuations: one for each prompt, with num_generations 1; then the answers are the new tokens only, and the
        same as if the answer had never been interrupted. `seed` has no part in them.

        Raises UserError for a prompt over max_prompt_tokens and for sampling parameters out of range.
        """
        check_sampling(sampling)
        assert not self._released, "sync() before generate(): release() gave the weights back"
        if sampling.max_tokens > self.max_tokens:
            raise UserError(f"sampling.max_tokens {sampling.max_tokens} is over the generator's {self.max_tokens}")
        assert continuations is None or (num_generations == 1 and len(continuations) == len(prompts))
        for number, prompt in enumerate(prompts):
            tokens = len(prompt.ids)
            if continuations:
                going_on = continuations[number]
                tokens -= going_on.offset
                assert 0 < going_on.limit <= sampling.max_tokens - going_on.offset, (going_on, sampling.max_tokens)
            if not 0 < tokens <= self.max_prompt_tokens:
                raise UserError(
                    f"prompt {prompt.key} has {tokens} tokens; the window takes 1 to {self.max_prompt_tokens} "
                    "(rollout.max_prompt_tokens)"
                )
        return _Call(self, prompts, num_generations, sampling, seed, on_token, continuations).run()

    def _decode_cell(self, sampling: SamplingConfig) -> _Decode:
        features = () if sampling.repetition_penalty == 1 else ("penalty",)
        if sampling.temperature == 0:
            features += ("greedy",)
        else:
            on = (("top_k", sampling.top_k > 0), ("top_p", sampling.top_p < 1), ("min_p", sampling.min_p > 0))
            features += tuple(name for name, is_on in on if is_on)
        if features not in self._decode:
            self._decode[features] = _Decode(self.decoder, self._caches, self.slots, self.length, features)
        return self._decode[features]


class _Call:
    """The state of one `generate`: which slot answers what, and what it has said so far."""

    def __init__(
        self,
        generator: Generator,
        prompts,
        num_generations: int,
        sampling: SamplingConfig,
        seed: int,
        on_token,
        continuations,
    ):
        self.generator, self.prompts, self.sampling, self.seed = generator, prompts, sampling, seed
        self.num_generations, self.on_token, self.continuations = num_generations, on_token, continuations
        slots, vocabulary = generator.slots, generator.policy.config.vocab_size
        self.cell = generator._decode_cell(sampling)
        self.first = first_samples(prompts, num_generations)
        self.waiting_prompts = deque(range(len(prompts)))
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
        self.width = generator.prompt_width(max((len(prompt.ids) for prompt in prompts), default=1))
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
        keys = ((p, s) for p in range(len(self.prompts)) for s in range(self.num_generations))
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
            ids = self.prompts[index].ids[:-1]
            tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
            self.waiting.extend(_Task(index, sample, row) for sample in range(self.num_generations))
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width)).copy()
        self.cached = self.generator._prefill(Tensor(tokens), Tensor(positions), Tensor(segments))
        self.generator.prefilled += len(taken)

    def _insert(self, slots: list[int], tasks: list[_Task]) -> None:
        generator, width = self.generator, self.width
        kv_heads = generator.policy.config.num_kv_heads
        # A graph of fixed shape: the last insertion repeated, which writes the same again.
        padding = generator.insert_rows - len(slots)
        target = np.array(slots + slots[-1:] * padding, np.int32)
        source = np.array([task.row for task in tasks] + [tasks[-1].row] * padding, np.int32)
        first = (target[:, None] * kv_heads + np.arange(kv_heads, dtype=np.int32)) * generator.length
        rows = (first[:, :, None] + np.arange(width, dtype=np.int32)).reshape(-1)
        generator._insert(Tensor(source), Tensor(rows), *self.cached)
        for slot, task in zip(slots, tasks, strict=True):
            prompt = self.prompts[task.prompt]
            self.task[slot] = task
            self.token[slot], self.position[slot], self.length[slot] = prompt.ids[-1], len(prompt.ids) - 1, 0
            if self.continuations:
                going_on = self.continuations[task.prompt]
            else:
                sample = self.first[task.prompt] + task.sample
                going_on = Continuation(answer_key(self.seed, prompt.key, sample), 0, self.sampling.max_tokens)
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
                self.on_token(task.prompt * self.num_generations + task.sample, known)
        stopped = np.isin(token, self.generator.stop_ids)
        for slot in np.flatnonzero(active & (stopped | (self.length >= self.limit))):
            self._finish(slot, bool(stopped[slot]))

    def _finish(self, slot: int, finished: bool) -> None:
        task, count = self.task[slot], self.length[slot]
        self.done[task.prompt, task.sample] = Rollout(
            prompt_ids=self.prompts[task.prompt].ids,
            response_ids=self.response[slot, :count].copy(),
            sampled_logprobs=self.logprob[slot, :count].copy(),
            finished=finished,
            group=task.prompt,
        )
        self.task[slot] = None
        self.token[slot] = self.position[slot] = 0
