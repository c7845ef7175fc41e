"""The reference policy's log-probs of fixed answers: computed once, at each step, or with the adapters off."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from mindrlhf.data.packing import Packing
from mindrlhf.errors import UserError
from mindrlhf.types import Conversation
from mindrlhf.utils.checkpoint import PARTIAL
from mindrlhf.utils.parallel import from_main, is_main
from mindrlhf.wrapper.scorer import Scorer

CACHED, LIVE, ADAPTER_OFF = "cached", "live", "adapter_off"
CACHE_FILE = "reference_logprobs.npz"
SCORED_TOGETHER = 2048  # examples

Pack = Callable[[Sequence[Conversation]], Packing]


def answer_logprobs(scorer: Scorer, packing: Packing) -> np.ndarray:
    """Log-probs summed over each answer's tokens, [answers] float32, in the order that was packed."""
    per_answer = packing.collect(scorer.score(packing.batches))
    return np.array([values.sum(dtype=np.float64) for values in per_answer], np.float32)


class Reference:
    """Log-probs of named lists of examples, each of which is a list of as many answers as the others of its list.

    Either from `scorer`, run inside `context`, or from a cache, which lies in the run's directory so that a resumed run
    goes on with the same bits.
    """

    def __init__(self, answers: dict[str, list[list[Conversation]]], pack: Pack):
        self.answers, self.pack = answers, pack
        self.scorer: Scorer | None = None
        self.context: Callable[[], AbstractContextManager] = nullcontext
        self.cache: dict[str, np.ndarray] | None = None  # name -> [examples, answers of each]

    def logprobs(self, name: str, numbers: Sequence[int]) -> np.ndarray:
        """Of the examples `numbers` of that list, [examples, answers of each] float32."""
        if self.cache is not None:
            return self.cache[name][np.asarray(numbers, int)]
        assert self.scorer is not None, "neither a scorer nor a cache: fit has not begun"
        answers = [answer for number in numbers for answer in self.answers[name][number]]
        if not answers:
            return np.zeros((0, 1), np.float32)
        with self.context():
            return answer_logprobs(self.scorer, self.pack(answers)).reshape(len(numbers), -1)

    def fill_cache(self, directory: Path) -> None:
        """By one pass over every answer; the scorer is let go."""
        cache = {}
        for name, answers in self.answers.items():  # packed in parts: all of a large data set would need much memory
            starts = range(0, max(len(answers), 1), SCORED_TOGETHER)
            parts = [self.logprobs(name, range(i, min(i + SCORED_TOGETHER, len(answers)))) for i in starts]
            cache[name] = np.concatenate(parts)
        self.cache, self.scorer = cache, None
        if not is_main():
            return
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f"{PARTIAL}{CACHE_FILE}"
        with open(temporary, "wb") as file:
            np.savez(file, digest=np.array(self._digest()), **cache)
        os.replace(temporary, directory / CACHE_FILE)

    def read_cache(self, directory: Path) -> bool:
        """Whether there was one. Raises UserError where it is of other answers."""
        path = directory / CACHE_FILE
        if not from_main(path.is_file):
            return False
        try:
            with np.load(path) as file:
                digest, cache = str(file["digest"]), {name: file[name] for name in self.answers}
        except (OSError, ValueError, KeyError, BadZipFile):
            raise UserError(f"{path}: is not whole; remove it where model.path or model.reference is set") from None
        if digest != self._digest():
            raise UserError(
                f"{path}: is of other answers than the data files hold now; restore the files, or set output= to "
                "another directory"
            )
        self.cache = cache
        return True

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, examples in self.answers.items():
            digest.update(f"{name} {len(examples)} ".encode())
            for answer in (answer for example in examples for answer in example):
                digest.update(answer.ids.tobytes())
                digest.update(answer.trained.tobytes())
        return digest.hexdigest()
