"""How good a checkpoint is: accuracy and pass@k on held-out problems."""

import math
from collections.abc import Sequence

import numpy as np

from mindrlhf.errors import UserError


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Mean over problems of 1 - C(n - c, k) / C(n, k): the chance that one of k answers is right, without bias.

    correct: right answers c of each problem out of n = samples. Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k}: k must be between 1 and the {samples} answers a problem (num_generations)")
    return float(np.mean([1 - math.comb(samples - c, k) / math.comb(samples, k) for c in correct]))
