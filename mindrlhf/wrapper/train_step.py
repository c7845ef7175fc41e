"""One optimizer step: gradients over micro-batches, global-norm clip, AdamW; what is not finite is skipped, named."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from mindrlhf.config import OptimizerConfig
from mindrlhf.layout import ONE_PROCESS
from mindrlhf.models import cpu_kernels
from mindrlhf.models.shard import Shard
from mindrlhf.utils.memory import give_back
from mindrlhf.wrapper.balance import Balancer
from mindrlhf.wrapper.graph import Graph
from mindrlhf.wrapper.loss_scale import LossScale, Scaled
from mindrlhf.wrapper.replicas import Replicas
from mindrlhf.wrapper.sampling import mix

_own = cpu_kernels.PRIMITIVES  # on a CPU; without them both cells below need a copy of the largest parameter
_has_own = _own is not None


class StepResult(NamedTuple):
    loss: float  # sum over the micro-batches: the weights are computed over the whole step
    metrics: dict[str, float]  # the objective's sums; names that end in _max are maxima
    gradient_norm: float  # global, before the clip
    skipped: str  # empty, or the first tensor whose loss or gradient is not finite
    routing: dict[str, float] = {}  # what the experts did, see Balancer, and with float16 the loss scale


@constexpr
def spelled(names):
    """Names as the bytes of a tensor, with spaces between them: a graph with strings in its outputs cannot be kept."""
    return Tensor(np.frombuffer(" ".join(names).encode() or b" ", np.uint8).copy())


class _Accumulate(Graph):
    """Gradients of one micro-batch, added to the buffers, times the loss scale where there is one.

    sequence_ranks: each takes its share of the objective, and together they have the loss once.
    """

    def __init__(self, objective: nn.Cell, parameters, buffers, sequence_ranks: int, loss_scale: LossScale | None):
        super().__init__(auto_prefix=False)
        self.buffers, self.sequence_ranks = buffers, sequence_ranks
        self.scale = loss_scale.parameter if loss_scale else None
        scaled = objective if sequence_ranks == 1 else Scaled(objective, 1.0 / sequence_ranks)
        scaled = scaled if self.scale is None else Scaled(scaled, self.scale)
        self.objective = scaled  # so that its parameters are this cell's
        self.gradient = ms.value_and_grad(scaled, None, parameters, has_aux=True)

    def construct(self, *batch):
        (loss, metrics), gradients = self.gradient(*batch)
        for i in range(len(self.buffers)):
            loss = ops.depend(loss, ops.assign_add(self.buffers[i], gradients[i]))
        if self.sequence_ranks > 1:
            loss = loss * self.sequence_ranks
        if self.scale is not None:
            loss = loss / self.scale
        return loss, spelled(tuple(metrics.keys())), tuple(metrics.values())


class _Evaluate(Graph):
    """An objective alone. As the output of a graph, a dict falls back to the Python interpreter, which fails."""

    def __init__(self, objective: nn.Cell):
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(self, *batch):
        loss, metrics = self.objective(*batch)
        return loss, spelled(tuple(metrics.keys())), tuple(metrics.values())


class _SquaredNorms(Graph):
    def __init__(self, buffers):
        super().__init__(auto_prefix=False)
        self.buffers = buffers

    def construct(self):
        norms = ()
        for i in range(len(self.buffers)):
            if _has_own:
                norms = norms + (_own.squared_sum(self.buffers[i]),)
            else:
                norms = norms + ((self.buffers[i] * self.buffers[i]).sum().reshape(1),)
        return ops.concat(norms)


class _Update(Graph):
    """AdamW on every parameter, the gradient buffers zeroed behind it."""

    def __init__(self, parameters, buffers, first_moments, second_moments, decayed: Sequence[bool], beta1, beta2):
        super().__init__(auto_prefix=False)
        self.parameters, self.buffers = parameters, buffers
        self.first, self.second = first_moments, second_moments
        self.decayed = tuple(decayed)
        self.beta1, self.beta2 = Tensor(beta1, ms.float32), Tensor(beta2, ms.float32)
        self.adam = ops.AdamWeightDecay()

    def construct(self, scale, learning_rate, epsilon, decay, zero):
        done = zero
        for i in range(len(self.parameters)):
            its_decay = decay if self.decayed[i] else zero
            moved = self.parameters[i], self.first[i], self.second[i]
            numbers = learning_rate, self.beta1, self.beta2, epsilon, its_decay
            if _has_own:
                done = ops.depend(done, _own.adamw(*moved, self.buffers[i], scale, *numbers))
            else:
                gradient = self.buffers[i] * scale
                step = self.adam(*moved, *numbers, gradient)
                done = ops.depend(done, (step, ops.assign(self.buffers[i], ops.zeros_like(gradient))))
        return done


class TrainStep:
    """Compiled training of an objective's parameters.

    objective: a Cell; objective(*batch) returns (loss, {name: scalar sum}). The loss is the sum over micro-batches,
    since every batch carries weights that were computed over the whole step.
    AdamW is Loshchilov and Hutter 2019 (arXiv 1711.05101) as torch computes it, decay on matrices only.
    """

    def __init__(
        self,
        objective: nn.Cell,
        parameters: Sequence[Parameter],
        optimizer: OptimizerConfig,
        set_dropout: Callable[[int], None] | None = None,
        seed: int = 0,
        auxiliary: nn.Cell | None = None,
        shard: Shard | None = None,
        balancer: Balancer | None = None,
        loss_scale: LossScale | None = None,
    ):
        """set_dropout: called before each micro-batch, with a hash of seed, step and its number, and with 0, which is
        off, behind the last. auxiliary: another objective of the same parameters, added to the first one's loss.
        shard: of the decoder that is trained, where processes share it; every rank is given every micro-batch.
        balancer: of its experts. loss_scale: for gradients in float16."""
        self.optimizer = optimizer
        self.set_dropout, self.seed = set_dropout, seed
        self.balancer, self.loss_scale = balancer, loss_scale
        self.parameters = ms.ParameterTuple(parameters)
        self.names = [parameter.name for parameter in parameters]
        self._buffers = self.parameters.clone(prefix="gradient", init="zeros")
        self.replicas = Replicas(shard or Shard(ONE_PROCESS), self.parameters, self._buffers)
        updated, reduced = self.replicas.updated, self.replicas.reduced
        self._first = updated.clone(prefix="first_moment", init="zeros")
        self._second = updated.clone(prefix="second_moment", init="zeros")
        ranks = self.replicas.layout.sequence
        what = self.parameters, self._buffers, ranks, loss_scale
        self._accumulate = _Accumulate(objective, *what)
        self._auxiliary = _Accumulate(auxiliary, *what) if auxiliary else None
        self._evaluate = _Evaluate(objective)
        self._squared_norms = _SquaredNorms(reduced)
        decayed = [len(parameter.shape) > 1 for parameter in parameters]
        betas = (optimizer.beta1, optimizer.beta2)
        self._update = _Update(updated, reduced, self._first, self._second, decayed, *betas)
        self.updates = 0  # optimizer steps taken
        self.skipped = 0  # and those skipped because a number was not finite

    def __call__(
        self, batches: Sequence[NamedTuple], learning_rate: float, auxiliary: Sequence[NamedTuple] = ()
    ) -> StepResult:
        """One optimizer step over the micro-batches, and over those of the auxiliary objective, whose loss and metrics
        are named auxiliary/..."""
        loss_scale = self.loss_scale.value if self.loss_scale else 1.0
        if self.balancer:
            self.balancer.start((*batches, *auxiliary), loss_scale)
        loss, metrics = self._run(self._accumulate, batches)
        if auxiliary:
            more, sums = self._run(self._auxiliary, auxiliary)
            loss += more
            metrics |= {f"auxiliary/{name}": value for name, value in (("loss", more), *sums.items())}
        routing = self.balancer.finish(self.replicas.data.ranks) if self.balancer else {}
        routing |= {"loss_scale": loss_scale} if self.loss_scale else {}
        self.replicas.sum_gradients()
        squared = self.replicas.squared_norms(self._squared_norms().asnumpy().astype(np.float64))
        norm = float(np.sqrt(sum(squared.values()))) / loss_scale
        if not (np.isfinite(norm) and np.isfinite(loss)):
            for buffer in {id(one): one for one in (*self._buffers, *self.replicas.reduced)}.values():
                buffer.set_data(Tensor(np.zeros(buffer.shape, np.float32)))
            if self.loss_scale and np.isfinite(loss) and self.loss_scale.halve():
                return StepResult(loss, metrics, norm, "", routing)  # which is how the largest scale is found
            self.skipped += 1
            bad = [name for name, value in squared.items() if not np.isfinite(value)]
            return StepResult(loss, metrics, norm, bad[0] if bad else "loss", routing)
        limit = self.optimizer.max_grad_norm
        clip = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
        self._apply(learning_rate, clip / loss_scale)
        if self.loss_scale:
            self.loss_scale.count()
        if self.balancer:
            self.balancer.update()
        return StepResult(loss, metrics, norm, "", routing)

    def evaluate(self, batches: Sequence[NamedTuple]) -> tuple[float, dict[str, float]]:
        """Loss and metric sums over the micro-batches, without dropout and without training."""
        return self._run(self._evaluate, batches, dropout=False)

    def _run(self, cell: nn.Cell, batches: Sequence[NamedTuple], dropout: bool = True):
        loss, metrics = 0.0, {}
        for number, batch in self.replicas.own(batches):
            if self.set_dropout and dropout:
                self.set_dropout(1 + int(mix(self.seed, self.updates, number)) % (2**31 - 2))
            micro_loss, names, sums = cell(*(Tensor(array) for array in batch))
            loss += float(micro_loss.asnumpy())
            for name, value in zip(names.asnumpy().tobytes().decode().split(), sums, strict=True):
                value = float(value.asnumpy())
                known = metrics.get(name, value if name.endswith("_max") else 0.0)
                metrics[name] = max(known, value) if name.endswith("_max") else known + value
        if self.set_dropout and dropout:
            self.set_dropout(0)
        return self.replicas.add(loss, metrics)

    def _apply(self, learning_rate: float, scale: float) -> None:
        """AdamWeightDecay has no bias correction: it is folded into its learning rate, epsilon and decay."""
        self.updates += 1
        optimizer = self.optimizer
        correction1 = 1 - optimizer.beta1**self.updates
        correction2 = (1 - optimizer.beta2**self.updates) ** 0.5
        numbers = (
            scale,
            learning_rate * correction2 / correction1,
            optimizer.epsilon * correction2,
            optimizer.weight_decay * correction1 / correction2,
            0.0,
        )
        self._update(*(Tensor(number, ms.float32) for number in numbers)).asnumpy()
        self.replicas.gather_parameters()

    @property
    def gradients(self) -> tuple[Parameter, ...]:
        """The gradient buffers, zero between steps, and with ZeRO the rows that a step updates, which it takes anew."""
        rows = [one for one in self.replicas.updated if one.name not in self.names]
        return tuple({id(one): one for one in (*self._buffers, *self.replicas.reduced, *rows)}.values())

    @property
    def moments(self) -> tuple[Parameter, ...]:
        """Adam's first and second moments, of what this rank updates."""
        return (*self._first, *self._second)

    @property
    def biases(self) -> list[Parameter]:
        """What a step changes beside the parameters: the biases of the experts' routers."""
        return self.balancer.biases if self.balancer else []

    def release(self) -> None:
        """Give back the gradient buffers' memory until the next step: they are zero, as dropped pages read."""
        give_back(self.gradients)

    def state(self) -> Iterator[tuple[str, np.ndarray]]:
        """Adam's moments, by parameter name, for a checkpoint: whole, and every rank has to go through all of them."""
        for kind, moments in (("first_moment", self._first), ("second_moment", self._second)):
            by_name = dict(zip(self.names, moments, strict=True))
            for name in self.names:
                yield f"{kind}.{name}", self.replicas.whole(name, by_name)
        if self.loss_scale:
            yield "loss_scale", self.loss_scale.state()

    def load_state(self, read, updates: int, skipped: int = 0) -> None:
        """read: name -> array, the inverse of `state`."""
        self.updates, self.skipped = updates, skipped
        if self.loss_scale:
            self.loss_scale.load_state(read("loss_scale"))
        for kind, moments in (("first_moment", self._first), ("second_moment", self._second)):
            for name, moment in zip(self.names, moments, strict=True):
                part = self.replicas.part(name, read(f"{kind}.{name}"))
                moment.set_data(Tensor(np.array(part, np.float32, order="C")))
