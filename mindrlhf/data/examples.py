"""From rows of data set files to tokenised examples: the one loop over files, rows and batches of texts."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from mindrlhf.config import DataConfig, SourceConfig
from mindrlhf.data.readers import Row, UnusableRows, read_rows
from mindrlhf.data.tokenizers import encode
from mindrlhf.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_ROWS_TOKENISED_TOGETHER = 1024  # enough for all cores; all texts of a file at once would need much memory


@dataclass(frozen=True)
class Examples(Generic[Item]):
    """The examples of a list of files in the files' order: what PromptOrder(sizes, probabilities, seed) numbers."""

    items: list[Item]
    sizes: list[int]  # examples of each file
    probabilities: list[float]  # share of the draws of each file; sums to 1
    skipped: dict[str, int]  # reason -> rows left out because data.strict is False
    stop_ids: tuple[int, ...] = ()  # sorted ids of the tokens that end answers; none where nothing is answered

    def __len__(self) -> int:
        return len(self.items)


class UnusableRow(Exception):
    """A row that is well-formed but cannot be trained on; `reason` is what it is counted under."""

    def __init__(self, reason: str, problem: str):
        super().__init__(problem)
        self.reason, self.problem = reason, problem


@dataclass(frozen=True)
class Draft(Generic[Item]):
    """A row that is read but not yet tokenised, so that many rows can be tokenised together."""

    texts: list[str]
    finish: Callable[[list[np.ndarray]], list[Item]]  # from the ids of the texts, [n] int32 each; UnusableRow
    stop_ids: tuple[int, ...] = ()  # of the tokens that end its answers


def read_examples(
    sources: list[SourceConfig],
    data: DataConfig,
    tokenizer: Any,
    base: Path,
    draft: Callable[[Row], Draft[Item]],
    limit: str = "training.max_tokens",
) -> Examples[Item]:
    """Every row of every source through `draft`, which raises UnusableRow for one that is to be refused.

    Paths are relative to `base`; `limit` is the option that says how long an example may be, for the error message.
    What was skipped is logged in one line.

    Raises UserError for what the readers and `draft` refuse, wrong probabilities, a file without a usable row and,
    where data.strict, the first unusable row.
    """
    probabilities = normalised(sources)
    items: list[Item] = []
    sizes = []
    skipped: Counter[str] = Counter()
    stop_ids: set[int] = set()
    for source in sources:
        path = Path(base) / source.path
        unusable = UnusableRows(data.strict)
        before = len(items)
        rows = iter(read_rows(path, data.max_rows))
        while batch := list(islice(rows, _ROWS_TOKENISED_TOGETHER)):
            for drafted, finished in _read_batch(batch, tokenizer, draft, unusable):
                items += finished
                stop_ids.update(drafted.stop_ids)
        if len(items) == before:
            reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.skipped.items())
            fix = f"mend the rows, remove the file, or raise {limit} where they are too long"
            raise UserError(f"{path}: every row was skipped: {reasons}; {fix}")
        sizes.append(len(items) - before)
        skipped.update(unusable.skipped)
    if skipped:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        logger.warning("data: skipped rows (data.strict is false): %s", reasons)
    return Examples(items, sizes, probabilities, dict(skipped), tuple(sorted(stop_ids)))


def _read_batch(
    rows: list[Row], tokenizer: Any, draft: Callable[[Row], Draft[Item]], unusable: UnusableRows
) -> list[tuple[Draft[Item], list[Item]]]:
    drafts = []
    for row in rows:
        try:
            drafts.append((row, draft(row)))
        except UnusableRow as refused:
            unusable.refuse(row, refused.reason, refused.problem)
    ids = iter(encode(tokenizer, [text for _, drafted in drafts for text in drafted.texts]))
    finished = []
    for row, drafted in drafts:
        own = list(islice(ids, len(drafted.texts)))  # taken before finish may refuse the row
        try:
            finished.append((drafted, drafted.finish(own)))
        except UnusableRow as refused:
            unusable.refuse(row, refused.reason, refused.problem)
    return finished


def normalised(sources: list[SourceConfig]) -> list[float]:
    """The sources' shares of the draws, which sum to 1.

    Raises UserError for a share that is negative or not finite, and where all are 0.
    """
    for source in sources:
        if not (math.isfinite(source.probability) and source.probability >= 0):
            raise UserError(f"{source.path}: probability: {source.probability} is not a share; use 0 or more")
    total = sum(source.probability for source in sources)
    if sources and total == 0:
        names = ", ".join(source.path for source in sources)
        raise UserError(f"{names}: probability: all are 0; give one of the files more than 0")
    return [source.probability / total for source in sources]
