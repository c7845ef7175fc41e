"""A running average of the weights that are trained (EMA, Polyak averaging)."""

from collections.abc import Callable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.wrapper.graph import Graph


class _Average(Graph):
    def __init__(self, parameters, averages):
        super().__init__(auto_prefix=False)
        self.parameters, self.averages = parameters, averages

    def construct(self, decay):
        done = decay
        for i in range(len(self.parameters)):
            moved = self.averages[i] + (1.0 - decay) * (self.parameters[i] - self.averages[i])
            done = ops.depend(done, ops.assign(self.averages[i], moved))
        return done


class WeightAverage:
    """average = decay * average + (1 - decay) * parameter at each `update`. All float32.

    decay is in [0, 1); the average starts as the parameters are when it is made, or at the last `restart`.
    """

    def __init__(self, parameters: Sequence[Parameter], decay: float):
        self.names = [parameter.name for parameter in parameters]
        self.parameters = ms.ParameterTuple(parameters)
        self.averages = self.parameters.clone(prefix="average", init="same")
        self.decay = decay
        self._average = _Average(self.parameters, self.averages)

    def restart(self) -> None:
        """The average becomes the parameters as they are now."""
        self.load_state(dict(zip(self.names, (p.asnumpy() for p in self.parameters), strict=True)).__getitem__)

    def update(self) -> None:
        self._average(Tensor(self.decay, ms.float32)).asnumpy()

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """The averages by parameter name."""
        for name, average in zip(self.names, self.averages, strict=True):
            yield name, average.asnumpy()

    def load_state(self, read) -> None:
        """read: name -> array, the inverse of `state`."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.set_data(Tensor(np.array(read(name), np.float32)))

    def over(self, weights: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """Those weights by name, the averages in place of what was averaged."""
        own = dict(zip(self.names, self.averages, strict=True))
        return lambda name: own[name].asnumpy() if name in own else weights(name)
