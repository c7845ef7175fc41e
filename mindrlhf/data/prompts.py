"""The prompts of an online job, and the endless order in which they are drawn."""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.examples import Draft, UnusableRow, read_examples
from mindrlhf.data.readers import Row, column
from mindrlhf.data.templates import render_prompt
from mindrlhf.data.turns import Value
from mindrlhf.errors import UserError
from mindrlhf.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptSource:
    """The prompts of one file."""

    keys: range  # indices of its prompts in the data set
    probability: float  # share of the draws; sums to 1 over the sources


@dataclass(frozen=True)
class PromptDataset:
    """All prompts of a list of files in the files' order; `dataset[i].key == i`."""

    prompts: list[Prompt]
    sources: list[PromptSource]
    skipped: dict[str, int]  # reason -> rows left out because data.strict is False

    @classmethod
    def read(
        cls, sources: list[SourceConfig], data: DataConfig, tokenizer: Any, max_prompt_tokens: int, base: Path
    ) -> "PromptDataset":
        """Read, render and tokenise every row of every source; paths are relative to `base`.

        Raises UserError for what the readers and templates refuse, a file without a usable row, wrong probabilities,
        and, where data.strict, an empty prompt or one of more than `max_prompt_tokens` tokens.
        """
        examples = read_examples(
            sources, data, tokenizer, base, lambda row: _draft(row, data, tokenizer, max_prompt_tokens),
            "max_prompt_tokens",
        )  # fmt: skip
        prompts = [replace(prompt, key=key) for key, prompt in enumerate(examples.items)]
        keys = (range(end - size, end) for size, end in zip(examples.sizes, accumulate(examples.sizes), strict=True))
        return cls(prompts, list(map(PromptSource, keys, examples.probabilities)), examples.skipped)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def _draft(row: Row, data: DataConfig, tokenizer: Any, max_prompt_tokens: int) -> Draft[Prompt]:
    prompt = Value.read(row, data, "prompt_key")
    prompt.refuse_empty("empty prompt")
    text = render_prompt(prompt.value, data, tokenizer, prompt.where)
    label = column(row, data.label_key, 'data.label_key ("": none)') if data.label_key else None

    def finish(ids: list[np.ndarray]) -> list[Prompt]:
        count = len(ids[0])
        if count > max_prompt_tokens:
            problem = f"the prompt has {count} tokens, the limit is {max_prompt_tokens}"
            fix = f"raise max_prompt_tokens to {count} if the model's window holds it, shorten the prompt"
            raise UnusableRow("prompt too long", f"{problem}; {fix}")
        return [Prompt(ids[0], text, label, key=-1, row=row.values)]  # numbered when all are read

    return Draft([text], finish)


class PromptOrder:
    """A deterministic endless order over the prompts of several sources.

    Draw d takes its source by a random number that depends on (seed, d) alone; the source's next row comes from its
    shuffle of this epoch, which depends on (seed, source, epoch) alone. How often each source was drawn from is thus
    the whole state. With one source this is plain shuffled epochs: every row once in each.
    """

    def __init__(self, sizes: list[int], probabilities: list[float], seed: int):
        """`sizes`: rows of each source; `probabilities`: shares of the draws, which sum to 1.

        Raises UserError for no sources and a negative seed.
        """
        if not sizes:
            raise UserError("there are no prompts to draw from; list at least one file in data.train")
        if seed < 0:
            raise UserError(f"seed: {seed} is negative; use 0 or more")
        assert len(sizes) == len(probabilities) and min(sizes) > 0, (sizes, probabilities)
        assert math.isclose(sum(probabilities), 1.0), probabilities
        self._sizes = list(sizes)
        self._probabilities = [float(probability) for probability in probabilities]
        self._seed = seed
        self._drawn = [0] * len(sizes)  # draws from each source so far
        self._shuffles: dict[int, tuple[int, np.ndarray]] = {}  # source -> (epoch, [size] order of its rows)

    def take(self, n: int) -> list[int]:
        """The next n indices into the data set (rows of source k come after those of the sources before it)."""
        return [self._next() for _ in range(n)]

    def state(self) -> dict[str, Any]:
        """What `load_state` needs to go on from here; made of numbers and lists, for JSON."""
        return {"drawn": list(self._drawn), **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where the order that gave `state` stood.

        Raises UserError if that order was over other sizes, probabilities or another seed.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                problem = f"{name} was {state.get(name)} in the checkpoint and is {ours} now"
                fix = "restore the data files and config of that run, or start anew with trainer.resume: never"
                raise UserError(f"prompt order: {problem}; {fix}")
        self._drawn = list(state["drawn"])

    def _identity(self) -> dict[str, Any]:
        return {"sizes": list(self._sizes), "probabilities": list(self._probabilities), "seed": self._seed}

    def _next(self) -> int:
        source = self._choose_source(sum(self._drawn))
        epoch, offset = divmod(self._drawn[source], self._sizes[source])
        if self._shuffles.get(source, (None,))[0] != epoch:
            generator = _generator(self._seed, 1, source, epoch)
            self._shuffles[source] = epoch, generator.permutation(self._sizes[source])
        self._drawn[source] += 1
        return sum(self._sizes[:source]) + int(self._shuffles[source][1][offset])

    def _choose_source(self, draw: int) -> int:
        if len(self._sizes) == 1:
            return 0
        return int(_generator(self._seed, 0, draw).choice(len(self._sizes), p=self._probabilities))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key))
