"""How the processes of a job share its models: one layout for training, one for generation, one for scoring answers."""

from dataclasses import replace

from mindrlhf.config import OfflineConfig, OnlineConfig, ParallelConfig, config_to_yaml
from mindrlhf.errors import UserError
from mindrlhf.layout import Layout
from mindrlhf.utils.parallel import agree, start, world


def training_layout(config: OnlineConfig | OfflineConfig) -> Layout:
    """Also joins the other processes. Raises UserError for a layout that does not fit their number, before it joins
    them, and in all of them where their configurations differ."""
    layout = Layout.of(config.parallel, world().size, "parallel")
    if layout.size < world().size:
        raise UserError(
            f"parallel: {layout.describe()} is {layout.size} processes, and {world().size} were started; all of them "
            "have to train: raise parallel.data, or set it to 0"
        )
    if config.model.lora.dropout and layout.sequence > 1:
        raise UserError("model.lora.dropout: must be 0 where parallel.sequence splits the rows")
    described(config, layout)  # what it raises, too
    start()
    agree("the configuration", config_to_yaml(config))
    return layout


def described(config: OnlineConfig | OfflineConfig, training: Layout) -> str:
    """For people. Raises UserError as `generation_layout`."""
    said = f"{world().size} processes: training {training.describe()}"
    if isinstance(config, OnlineConfig):
        said += f"; generation {generation_layout(config.rollout.parallel, training).describe()}"
    return said


def generation_layout(config: ParallelConfig, training: Layout) -> Layout:
    """config: of the section rollout.parallel, whose zeros mean what training has. Raises UserError."""
    for name, value in (("sequence", config.sequence > 1), ("zero", config.zero)):
        if value:
            raise UserError(f"rollout.parallel.{name}: is for training; remove it")
    tensor = config.tensor or training.tensor
    expert = config.expert or (training.expert if tensor == training.tensor else 1)
    return Layout.of(replace(config, tensor=tensor, expert=expert), world().size, "rollout.parallel")


def scoring_layout(training: Layout) -> Layout:
    """Of models that only score: sequence ranks have answers of their own, like data ranks."""
    return replace(training, data=training.data * training.sequence, sequence=1, zero=False)


def row_multiple(width: int, layout: Layout) -> int:
    """The width of rows, at least so many tokens, that sequence ranks can share."""
    return -(-width // layout.sequence) * layout.sequence
