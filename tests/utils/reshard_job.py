"""One rank of tests/utils/test_reshard.py: many pairs of layouts, there and back, and a damaged element."""

import numpy as np

from mindrlhf.utils import parallel
from mindrlhf.utils.reshard import Resharder, ReshardError
from tests.utils.reshard_cases import SHAPES, bits, empty, filled, layouts


def main() -> None:
    parallel.start(threads=1)
    rank, size = parallel.world()
    found = layouts(size)
    pairs = [(one, found[(7 * i + 1) % len(found)]) for i, one in enumerate(found)]
    pairs += [(found[0], other) for other in found]
    for one, other in pairs:
        start, middle, end = filled(one, rank), empty(other, rank), empty(one, rank)
        for layout, source, to, target in ((one, start, other, middle), (other, middle, one, end)):
            resharder = Resharder(SHAPES, layout, to, bucket_bytes=4096)
            resharder.run(source.__getitem__, writer(target), check=target.__getitem__)
        expected = filled(other, rank)
        assert all(np.array_equal(bits(middle[name]), bits(expected[name])) for name in expected), (one, other)
        assert all(np.array_equal(bits(end[name]), bits(start[name])) for name in start), (other, one)
    damage(found[0], found[1], rank)
    parallel.gather_objects(None)
    print(f"{len(pairs)} pairs")


def writer(target: dict[str, np.ndarray]):
    def write(name: str, box: tuple[slice, ...], array: np.ndarray) -> None:
        target[name][box] = array

    return write


def damage(one, other, rank: int) -> None:
    """An element of one tensor that the last rank of the target writes wrongly is named by every rank."""
    source, target, name = filled(one, rank), empty(other, rank), "model.layers.0.mlp.down_proj.weight"

    def write(written: str, box: tuple[slice, ...], array: np.ndarray) -> None:
        writer(target)(written, box, array)
        if written == name and rank == other.size - 1:
            bits(target[name])[-1, -1] ^= 1

    try:
        Resharder(SHAPES, one, other).run(source.__getitem__, write, check=target.__getitem__)
    except ReshardError as error:
        print(f"found: {error}")


if __name__ == "__main__":
    main()
