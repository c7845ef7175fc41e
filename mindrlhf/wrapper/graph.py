"""Cells that Python calls, one at a time."""

import threading

from mindspore import nn

# MindSpore's graph executor deadlocks when two threads launch graphs, and its compiler has global state. A device runs
# one graph at a time as well, so taking turns costs nothing there.
_TURN = threading.RLock()


class Graph(nn.Cell):
    """An outermost cell: it compiles and runs while no other one does, whatever thread it is called from."""

    def __call__(self, *inputs):
        with _TURN:
            return super().__call__(*inputs)
