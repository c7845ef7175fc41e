"""What the planner is asked: a job's models and sizes, and the devices it is to run on."""

from dataclasses import dataclass

from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import Architecture, Weight


@dataclass(frozen=True)
class Job:
    """An online job: roles, and the sizes of a step. Sizes are the config's, whose keys are beside them."""

    policy: Architecture
    prompts_per_step: int  # rollout.prompts_per_step
    num_generations: int  # rollout.num_generations
    prompt_tokens: int  # rollout.max_prompt_tokens: every prompt is taken to be as long
    answer_tokens: int  # rollout.sampling.max_tokens: every answer is taken to be as long
    slots: int  # rollout.slots
    rows: int  # trainer.rows
    row_tokens: int  # of a packed row
    reference: Architecture | None = None
    critic: Architecture | None = None  # one with its own decoder
    reward_models: tuple[Architecture, ...] = ()
    updates: int = 1  # optimizer steps in a pass over the answers
    epochs: int = 1  # passes
    rescore: bool = False  # old log-probs by a forward pass of the policy
    asynchronous: bool = False  # the generator stays beside the training
    trainable: tuple[Weight, ...] | None = None  # of the policy, where it is not all: adapters, some layers
    adapters: tuple[Weight, ...] = ()  # weights that the policy has besides its architecture's
    swap: bool = False  # memory.swap

    @property
    def answers(self) -> int:
        """Of a step."""
        return self.prompts_per_step * self.num_generations

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True)
class Precision:
    """Bytes of a number, by what it is for."""

    weight: int
    activation: int
    gradient: int = 4  # of the buffers that gradients add up in
    moments: int = 8  # both of Adam's
    master: int = 0  # float32 copy of the weights that Adam moves
    master_with_zero: int = 4  # where the states are split: each data rank moves its share and sends it to the others


PRECISIONS = {"float32": Precision(4, 4), "bfloat16": Precision(2, 2, master=4)}


@dataclass(frozen=True)
class Devices:
    """How many of which kind. Rates are what a device reaches, not what its data sheet promises.

    The defaults are round figures for a device of the Ascend 910B class and have not been measured: about 0.4 of a
    nominal 300 TFLOP/s in 16 bits, two thirds of a nominal 1.6 TB/s of memory, links of a host's 8 devices and of a
    200 Gbit/s network card.
    """

    count: int
    memory: int  # bytes of one
    precision: str = "bfloat16"  # a key of PRECISIONS
    host_process: bool = False  # the device is the process itself, on a CPU: see mindrlhf.planner.host
    flops: float = 120e12  # floating-point operations a second in matrix products
    memory_bandwidth: float = 1e12  # bytes a second
    interconnect: float = 100e9  # bytes a second and device, in each direction, between devices of a host
    network: float = 20e9  # the same between hosts
    devices_per_host: int = 8
    latency: float = 20e-6  # seconds that a collective takes at least
    swap_bandwidth: float = 20e9  # bytes a second between a device and its host's memory

    def __post_init__(self):
        for name in ("count", "memory", "flops", "memory_bandwidth", "interconnect", "network", "devices_per_host",
                     "swap_bandwidth"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"--{_option(name)}: {getattr(self, name):g} must be over 0")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision: {self.precision!r} is not one of {', '.join(PRECISIONS)}")

    @property
    def numbers(self) -> Precision:
        return PRECISIONS[self.precision]

    def link(self, ranks: int) -> float:
        """Bytes a second between the ranks of a group of neighbours."""
        return self.interconnect if ranks <= self.devices_per_host else self.network


@dataclass(frozen=True)
class Arrangement:
    """How a job lies on the devices: what the search varies."""

    training: Layout
    generation: Layout
    rows: int  # packed rows a micro-batch, the job's or fewer: the result does not depend on it


def _option(name: str) -> str:
    return {"count": "devices", "memory": "device-memory"}.get(name, name.replace("_", "-"))
