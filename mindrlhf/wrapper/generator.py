"""Incremental inference: prompts to answers, with a KV cache and slots that are refilled as answers finish.

Three graphs, each of a fixed shape: prefill (a batch of prompts to keys and values), insert (those into the slots'
caches, one prompt to all of its answers) and decode (one token for every slot). The first token of an answer comes
from the decode graph too, fed with the prompt's last token, so every sampled token takes the same path.
"""

import math
from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS, Layout
from mindrlhf.models import kernels
from mindrlhf.models.decoder import Decoder
from mindrlhf.models.shapes import Weights, expected_shapes
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.memory import give_back
from mindrlhf.utils.parallel import gather_objects, world
from mindrlhf.utils.reshard import Resharder
from mindrlhf.wrapper.answering import Asked, Call, Continuation, first_samples
from mindrlhf.wrapper.graph import Graph
from mindrlhf.wrapper.sampling import check_sampling, next_token


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
        kinds = len(decoder.cache_widths)
        self.key_caches = ms.ParameterTuple(caches[::kinds])
        self.value_caches = ms.ParameterTuple(caches[kinds - 1 :: kinds])  # the same where there is one kind
        first_rows = np.arange(slots * decoder.cache_heads, dtype=np.int32) * length
        self.first_row = Tensor(first_rows.reshape(slots, -1))
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


class Generator:
    """Answers prompts with a decoder of its own.

    policy: the decoder that is trained; `sync` copies its weights. slots: answers decoded at the same time.
    max_prompt_tokens and max_tokens: what the caches hold, fixed so that nothing recompiles. stop_ids: tokens that
    end an answer; they stay in it. least_width: prompts are padded to it times a power of two, and every width is
    compiled once. layout: how processes share the generator, apart from how they share the policy; its data ranks
    answer prompts of their own, and all processes get all answers. check_sync: compare checksums at every `sync`.
    """

    def __init__(
        self,
        policy: Decoder,
        slots: int,
        max_prompt_tokens: int,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        least_width: int = 8,
        layout: Layout = ONE_PROCESS,
        check_sync: bool = False,
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
        self.layout, self.check_sync = layout, check_sync
        self.place = layout.place(world().rank)
        shapes = expected_shapes(config)
        self._resharder = Resharder(shapes, policy.layout, layout)
        self.decoder: Decoder | None = None  # of a rank that has a part in the layout
        self._caches: list[Parameter] = []
        if self.place is not None:
            self.decoder = Decoder(
                config, lambda name: np.broadcast_to(np.float32(0), shapes[name]), True, layout=layout
            )
            self._caches = self._empty_caches()
            self._prefill = _Prefill(self.decoder)
            self._insert = _Insert(self._caches)
        self._decode: dict[tuple[str, ...], _Decode] = {}
        self._released = False
        self.decode_steps = 0  # decode graphs run so far, for benchmarks and tests of slot use
        self.prefilled = 0  # prompts prefilled so far
        self.sync()

    def _empty_caches(self) -> list[Parameter]:
        rows = self.slots * self.decoder.cache_heads * self.length
        return [
            Parameter(Tensor(np.zeros((rows, width), np.float32)), name=f"cache.{layer}.{kind}", requires_grad=False)
            for layer in range(self.policy.config.num_layers)
            for kind, width in self.decoder.cache_widths.items()
        ]

    @property
    def parameters(self) -> list[Parameter]:
        """The weights, as this rank holds them."""
        return list(self.decoder.get_parameters()) if self.decoder else []

    def sync(self, weights: Weights | None = None) -> None:
        """Bring weights over, laid out for decoding; by default the policy's.

        weights: name -> this rank's slice in the policy's layout. All ranks have to call it.
        """
        own = self.decoder
        check = (own.own_weights if own else _nothing) if self.check_sync else None
        self._resharder.run(weights or self.policy.own_weights, own.write if own else _nothing, check)
        self._released = False

    def release(self) -> None:
        """Give back the memory of weights and caches until the next `sync`."""
        give_back([*self.parameters, *self._caches])
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
        first, own, answers = first_samples(prompts, num_generations), [], None
        if self.place is not None:
            own = range(self.place.data, len(prompts), self.layout.data)
            known = [continuations[number] for number in own] if continuations else None
            asked = [Asked(number, prompts[number], first[number]) for number in own]
            answers = Call(self, asked, num_generations, sampling, seed, on_token, known).run()
        return self._brought_together(answers, len(prompts) * num_generations, num_generations)

    def _brought_together(self, answers: list[Rollout] | None, total: int, num_generations: int) -> list[Rollout]:
        """Every rank's answers, in the order of the prompts, on every rank."""
        if world().size == 1:
            return answers
        is_speaker = self.place is not None and self.place.tensor == 0
        together: list[Rollout | None] = [None] * total
        for found in gather_objects(answers if is_speaker else None):
            for number, answer in enumerate(found or ()):
                together[answer.group * num_generations + number % num_generations] = answer
        return together

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


def _nothing(*_):
    raise AssertionError("this rank has no part in the generator's layout")
