"""Generation without a cache: every token from a forward over everything before it. The oracle of the fast one."""

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn

from mindrlhf.models.decoder import Decoder


class _LastLogits(nn.Cell):
    def __init__(self, decoder: Decoder):
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, tokens, positions, segments, last):
        return self.decoder.logits(self.decoder.targets(tokens, positions, segments, last))


class RecomputeGenerator:
    """Greedy answers, all prompts as one batch of rows, whose width grows in steps of `bucket`."""

    def __init__(self, decoder: Decoder, bucket: int = 64):
        self.cell, self.bucket, self.window = _LastLogits(decoder), bucket, decoder.config.max_positions

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[list[int]]:
        """max_tokens token ids a prompt; nothing stops earlier."""
        sequences = [list(map(int, ids)) for ids in prompts]
        for _ in range(max_tokens):
            for sequence, token in zip(sequences, self._next(sequences), strict=True):
                sequence.append(int(token))
        return [sequence[len(ids) :] for sequence, ids in zip(sequences, prompts, strict=True)]

    def compile(self, rows: int, longest: int) -> None:
        """Every width up to `longest` tokens, so that `generate` measures no compilation."""
        for width in range(self.bucket, longest + self.bucket, self.bucket):
            self._next([[0] * min(width, self.window)] * rows)

    def _next(self, sequences: list[list[int]]) -> np.ndarray:
        longest = max(map(len, sequences))
        width = min(-(-longest // self.bucket) * self.bucket, self.window)
        tokens, segments = (np.zeros((len(sequences), width), np.int32) for _ in range(2))
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)], segments[row, : len(sequence)] = sequence, 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape).copy()
        last = np.array([row * width + len(sequence) - 1 for row, sequence in enumerate(sequences)], np.int32)
        logits = self.cell(*(Tensor(array) for array in (tokens, positions, segments, last)))
        return logits.asnumpy().argmax(-1)
