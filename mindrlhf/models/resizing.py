"""Special tokens added to a tokenizer, and rows for them in the embedding and the head."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mindrlhf.data.tokenizers import add_special_tokens
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.shapes import EMBEDDING, HEAD, Weights


def with_tokens(
    tokenizer: Any, config: DecoderConfig, weights: Weights, tokens: Sequence[str]
) -> tuple[DecoderConfig, Weights]:
    """The tokenizer learns those of the tokens that it does not know, as special ones; the model gets their rows.

    Every new token's row, of the embedding and of the head, is the mean over the tokens that were known before: its
    logit is then the mean logit, and training starts with hardly another distribution (Hewitt 2021, "Initializing New
    Word Embeddings for Pretrained Language Models"). A row that a padded embedding already has for a token's id is
    taken instead of a new one; the vocabulary grows to the largest id and no further.

    Raises UserError for an empty token.
    """
    known = np.array(sorted(set(tokenizer.get_vocab().values())))
    add_special_tokens(tokenizer, tokens)
    new = np.setdiff1d(tokenizer.convert_tokens_to_ids(list(tokens)), known)
    if not len(new):
        return config, weights
    before, after = config.vocab_size, max(config.vocab_size, int(new.max()) + 1)

    def resized(name: str) -> np.ndarray:
        array = weights(name)
        if name not in (EMBEDDING, HEAD):
            return array
        rows = np.empty((after, array.shape[1]), np.float32)
        rows[:before] = array
        rows[new] = array[known].mean(0, dtype=np.float64)
        return rows

    return replace(config, vocab_size=after), resized
