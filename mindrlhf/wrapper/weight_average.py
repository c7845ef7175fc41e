"""A running average of the weights that are trained (EMA, Polyak averaging)."""

from collections.abc import Callable, Iterator, Sequence

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from mindrlhf.layout import ONE_PROCESS
from mindrlhf.models.shard import Shard
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

    def __init__(self, parameters: Sequence[Parameter], decay: float, shard: Shard | None = None):
        """shard: of the decoder that they belong to, where processes share it."""
        self.shard = shard or Shard(ONE_PROCESS)
        self.names = [parameter.name for parameter in parameters]
        self.parameters = ms.ParameterTuple(parameters)
        self.averages = self.parameters.clone(prefix="average", init="same")
        self.decay = decay
        self._average = _Average(self.parameters, self.averages)

    def restart(self) -> None:
        """The average becomes the parameters as they are now."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.set_data(Tensor(parameter.asnumpy().copy()))

    def update(self) -> None:
        self._average(Tensor(self.decay, ms.float32)).asnumpy()

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """The averages by parameter name, whole; every rank has to go through all of them."""
        for name, average in zip(self.names, self.averages, strict=True):
            yield name, self.shard.whole(name, average.asnumpy())

    def load_state(self, read) -> None:
        """read: name -> array, the inverse of `state`."""
        read = self.shard.cut(read)
        for name, average in zip(self.names, self.averages, strict=True):
            average.set_data(Tensor(np.array(read(name), np.float32, order="C")))

    def over(self, weights: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """This rank's slices of those weights by name, the averages in place of what was averaged."""
        own = dict(zip(self.names, self.averages, strict=True))
        return lambda name: own[name].asnumpy() if name in own else weights(name)
