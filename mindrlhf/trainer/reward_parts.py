"""The parts of a reward, opened from the configuration: functions, models and servers."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mindrlhf.config import RewardFunctionConfig
from mindrlhf.errors import UserError
from mindrlhf.layout import ONE_PROCESS, Layout
from mindrlhf.rewards import Rewards
from mindrlhf.rewards.remote import RemoteReward
from mindrlhf.rewards.user import load_reward_function
from mindrlhf.utils.parallel import start

if TYPE_CHECKING:
    from mindrlhf.trainer.process_reward_model import ProcessRewardModel
    from mindrlhf.trainer.reward_model import RewardModel

# What each kind of part reads beside weight and name.
PROCESS = ("process", "step_separator", "step_reduction", "steps")
READ = {
    "function": ("function", "arguments"),
    "model": ("model", "normalize_reward", *PROCESS),
    "urls": ("urls", "timeout", "retries"),
}


def open_rewards(configs: Sequence[RewardFunctionConfig], base: Path, layout: Layout = ONE_PROCESS) -> Rewards:
    """Every entry of the config's `rewards`, paths relative to base. layout: how processes share the models.

    A part without a name is called as its function, `model` or `remote`. Raises UserError, with the entry's number.
    """
    parts = []
    for number, config in enumerate(configs):
        kind = _kind(config, f"rewards[{number}]")
        try:
            name, part = OPENERS[kind](config, base, layout)
        except UserError as error:
            raise UserError(f"rewards[{number}]: {error}") from None
        parts.append((config.name or name, part, config.weight))
    return Rewards(parts)


class ModelReward:
    """A reward function in TRL's form around a model that scores texts; where processes share it, all of them ask."""

    shared = True

    def __init__(self, model: "RewardModel | ProcessRewardModel", place: str, normalize: bool = False):
        """place: what an error message calls it by. normalize: a reward model's scores, by its own statistics."""
        self.model, self.place, self.normalize = model, place, normalize
        self.parameters = list(model.policy.decoder.get_parameters())

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """[n] float32."""
        scores = self.model.score_texts(prompts, completions)
        return self.model.normalized(scores) if self.normalize else scores


def _open_function(config: RewardFunctionConfig, base: Path, layout: Layout) -> tuple[str, Callable]:
    function = load_reward_function(config.function, base, config.arguments)
    return config.function.rpartition(":")[2], function


def _open_model(config: RewardFunctionConfig, base: Path, layout: Layout) -> tuple[str, Callable]:
    start()
    directory = Path(base) / config.model
    if config.process:
        from mindrlhf.trainer.process_reward_model import ProcessRewardModel

        return "model", ModelReward(ProcessRewardModel.open(directory, config, layout), str(directory))
    from mindrlhf.trainer.reward_model import RewardModel

    return "model", ModelReward(RewardModel.open(directory, layout), str(directory), config.normalize_reward)


def _open_servers(config: RewardFunctionConfig, base: Path, layout: Layout) -> tuple[str, Callable]:
    return "remote", RemoteReward(config.urls, config.timeout, config.retries)


OPENERS: dict[str, Callable[[RewardFunctionConfig, Path, Layout], tuple[str, Callable]]] = {
    "function": _open_function,
    "model": _open_model,
    "urls": _open_servers,
}


def _kind(config: RewardFunctionConfig, where: str) -> str:
    """`function`, `model` or `urls`. Raises UserError for none or two, and for keys that only another kind reads."""
    default = RewardFunctionConfig()
    given = [field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)]
    kinds = [kind for kind in READ if kind in given]
    if len(kinds) > 1:
        raise UserError(f"{where}: has {' and '.join(kinds)}; make one entry of each, with weights of their own")
    if not kinds:
        raise UserError(f"{where}: nothing gives the reward; set function, model or urls")
    kind = kinds[0]
    for name in given:
        if name not in ("weight", "name", *READ[kind]):
            reader = next(other for other, names in READ.items() if name in names)
            raise UserError(f"{where}: {name} is for an entry with {reader}, this one has {kind}; remove it")
    idle = [name for name in given if name in PROCESS[1:]]
    if idle and not config.process:
        raise UserError(f"{where}: {idle[0]} is for a process reward model; set process: true, or remove it")
    if config.process and config.normalize_reward:
        raise UserError(f"{where}: normalize_reward: judgements of steps lie in [0, 1] already; remove it")
    return kind
