"""Cells that Python calls, one at a time."""

import threading

from mindspore import Parameter, nn

from mindrlhf.utils import compile_cache

# MindSpore's graph executor deadlocks when two threads launch graphs, and its compiler has global state. A device runs
# one graph at a time as well, so taking turns costs nothing there.
_TURN = threading.RLock()


class Graph(nn.Cell):
    """An outermost cell: it compiles and runs while no other one does, whatever thread it is called from."""

    def __init__(self, auto_prefix: bool = False):
        super().__init__(auto_prefix=auto_prefix)
        self.known_shapes = set()  # of the inputs that it is compiled for

    def __call__(self, *inputs):
        with _TURN:
            if not compile_cache.is_active():
                return super().__call__(*inputs)
            shapes = tuple((tuple(one.shape), str(one.dtype)) for one in inputs)
            if shapes in self.known_shapes:
                return super().__call__(*inputs)
            self.known_shapes.add(shapes)
            return compile_cache.run(self, inputs, super().__call__)

    def parameters_dict(self, recurse: bool = True):
        """Those in tuples too, which a graph that is loaded looks for by name, and would else have copies of."""
        found = super().parameters_dict(recurse)
        for value in vars(self).values():
            for one in value if isinstance(value, tuple) else ():
                if isinstance(one, Parameter):
                    found.setdefault(one.name, one)
        return found
