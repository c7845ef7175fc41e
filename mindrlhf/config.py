"""The job's configuration: dataclasses, read strictly from YAML with `a.b=c` overrides.

An unknown key, a value of the wrong type and a value out of range are each one line that names the file, the line and
the field. The dataclasses are the reference of what exists: every field says its meaning and unit beside it.
"""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mindrlhf.errors import UserError

# Read from a YAML they are relative to its directory, from an override to the current one; made absolute on reading.
PathText = typing.NewType("PathText", str)
FunctionText = typing.NewType("FunctionText", str)  # a name, or path.py:function


@dataclass
class BuildConfig:
    """A model made from nothing, for when there is no checkpoint: random weights and a trained tokenizer."""

    decoder: dict[str, Any] = field(default_factory=dict)  # keys of a Hugging Face config.json, model_type included
    vocab_size: int = 320  # of the byte-level BPE trained on tokenizer_files; at least 260
    tokenizer_files: list[PathText] = field(default_factory=list)  # any text
    chat_template: str = ""  # jinja; empty: none


@dataclass
class ModelConfig:
    path: PathText = ""  # a Hugging Face checkpoint directory; empty: build
    build: BuildConfig = field(default_factory=BuildConfig)
    tokenizer: PathText = ""  # a tokenizer directory; empty: the checkpoint's own
    reference: PathText = ""  # checkpoint of the reference policy; empty: the policy as training starts


@dataclass
class SourceConfig:
    """One data set file."""

    path: PathText = ""  # .json, .jsonl, .csv or .parquet
    probability: float = 1.0  # share of this file among the training sources, normalised to 1


@dataclass
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)
    test: list[SourceConfig] = field(default_factory=list)  # held out; never trained on
    prompt_key: str = "prompt"  # column with a string or a list of chat messages
    label_key: str = "label"  # column with the reference answer; empty: none
    response_key: str = "response"  # column with the answer to imitate (supervised training)
    apply_chat_template: bool = False  # the tokenizer's jinja template; a string becomes one user message
    system_prompt: str = ""  # put before every conversation when the chat template is used
    input_template: str = "{}"  # otherwise: "{}" is where the prompt goes
    max_rows: int = 0  # first rows of each file only; 0: all
    strict: bool = True  # False: rows that are empty or longer than the window are skipped and counted


@dataclass
class WarmupConfig:
    """Supervised training before the online stage."""

    steps: int = 0  # optimizer steps; 0: no warm-up
    train: list[SourceConfig] = field(default_factory=list)  # of prompt_key and response_key
    batch_size: int = 64  # conversations an optimizer step
    learning_rate: float = 1e-3
    warmup_steps: int = 0  # linear rise of the learning rate


@dataclass
class SamplingConfig:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen
    max_tokens: int = 256  # of one answer
    stop: list[str] = field(default_factory=list)  # token strings that end an answer besides the tokenizer's own


@dataclass
class RolloutConfig:
    prompts_per_step: int = 32
    num_generations: int = 8  # answers a prompt: the group
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    slots: int = 64  # answers decoded at the same time
    max_prompt_tokens: int = 512  # the window: a longer prompt is an error, see data.strict


@dataclass
class RewardConfig:
    """One part of the reward."""

    function: FunctionText = "accuracy"  # a name of mindrlhf.rewards, or path.py:function
    weight: float = 1.0


@dataclass
class AlgorithmConfig:
    """What is None takes the default of the algorithm's row in mindrlhf/trainer/algorithms.py."""

    name: str = "grpo"  # a row of the table
    learning_rate: float = 1e-6  # peak
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0  # linear rise of the learning rate from 0
    min_learning_rate_ratio: float = 0.0  # linear and cosine end at this times the peak
    aggregation: str | None = None  # token_mean, sequence_mean, sequence_sum, constant or token_sum
    advantage_epsilon: float = 1e-6  # added to the group's standard deviation
    eps_low: float = 0.2  # clip range of the ratio below 1
    eps_high: float | None = None  # clip range above 1
    dual_clip: float = 0.0  # bound of the loss where the advantage is negative, over 1; 0: off
    kl_coef: float | None = None  # weight of the KL to the reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in_reward: bool = False  # True: subtracted from the reward; False: added to the loss
    entropy_coef: float = 0.0  # bonus for entropy
    reward_clip: float = 10.0  # rewards are clipped to [-reward_clip, reward_clip] before the group's baseline
    epochs_per_rollout: int = 1  # passes over each batch of answers
    updates_per_epoch: int = 1  # optimizer steps that a pass is split into
    dynamic_sampling: bool | None = None  # resample until no group is all right or all wrong
    dynamic_sampling_max_rounds: int = 4  # generation rounds a step before it trains on what it has
    overlong_buffer: int | None = None  # last tokens of max_tokens, where the length penalty rises to factor; 0: off
    overlong_factor: float = 1.0


@dataclass
class OptimizerConfig:
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: never on norms and biases
    max_grad_norm: float = 1.0  # global norm; 0: off


@dataclass
class TrainerConfig:
    steps: int = 0  # batches of answers; 0: epochs passes over the prompts
    epochs: int = 1  # passes over the prompts where steps is 0
    rows: int = 16  # packed rows a micro-batch
    row_tokens: int = 0  # tokens a packed row; 0: the window, max_prompt_tokens + max_tokens
    evaluate_every: int = 0  # steps; 0: before and after only
    evaluate_rows: int = 0  # first held-out problems; 0: all
    save_every: int = 0  # steps; 0: at the end only
    keep_checkpoints: int = 2  # older ones are removed; 0: keep all
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest whole checkpoint of the output directory


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb: bool = False  # needs `pip install wandb`
    swanlab: bool = False  # needs `pip install swanlab`
    project: str = "mindrlhf"  # for wandb and swanlab
    completions_every: int = 10  # steps between dumps of sampled answers; 0: off
    progress: bool = True  # the bar in the terminal


@dataclass
class GRPOConfig:
    """An online job: `mindrlhf grpo --config x.yaml`. Also what GRPOTrainer takes."""

    seed: int = 1
    output: str = "runs/grpo"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def epochs(self) -> int:
        return self.trainer.epochs

    @property
    def num_generations(self) -> int:
        return self.rollout.num_generations


@dataclass
class InferenceConfig:
    """What `mindrlhf generate` and `mindrlhf eval` do with a checkpoint."""

    seed: int = 1
    num_generations: int = 1  # answers a prompt
    slots: int = 32  # answers decoded at the same time
    max_prompt_tokens: int = 512
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])


def load_config(cls: type, path: str | Path | None, overrides: typing.Sequence[str] = ()) -> Any:
    """Read a YAML file into the dataclass `cls`, apply `a.b=c` overrides, and check every key and type.

    Without a path: the defaults and the overrides. Raises UserError naming file, line and field.
    """
    node = _compose(Path(path)) if path else None
    if node is None:
        node = yaml.MappingNode("tag:yaml.org,2002:map", [])
    for override in overrides:
        _apply_override(node, override)
    return _parse(cls, node, "", str(path or "config"))


def _compose(path: Path) -> yaml.Node | None:
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from None


def config_to_yaml(config: Any) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def difference(there: str, here: str, ignored: typing.Sequence[str]) -> str:
    """The first fields in which two configurations in YAML differ, empty where none does.

    ignored: dotted names, or prefixes that end in a dot.
    """
    flat_there, flat_here = _flatten(yaml.safe_load(there)), _flatten(yaml.safe_load(here))
    changed = [
        f"{name}: {flat_there.get(name)!r} there, {flat_here.get(name)!r} here"
        for name in sorted({*flat_there, *flat_here})
        if flat_there.get(name) != flat_here.get(name)
        and not any(name == one or (one.endswith(".") and name.startswith(one)) for one in ignored)
    ]
    return "; ".join(changed[:3])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: in YAML 1.1 `1e-5` is a string, which no one means."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan|Inf|NaN))$"),
    list("-+0123456789."),
)


def _apply_override(root: yaml.MappingNode, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise UserError(f"override {override!r}: write it as section.key=value")
    try:
        value = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML") from None
    if value is None:
        value = yaml.ScalarNode("tag:yaml.org,2002:str", "")  # `output=` is the empty text
    _mark(value, override)
    node = root
    *sections, key = name.split(".")
    for section in sections:
        child = _child(node, section)
        if not isinstance(child, yaml.MappingNode):
            child = yaml.MappingNode("tag:yaml.org,2002:map", [])
            child.override = override
            _set_child(node, section, child, override)
        node = child
    _set_child(node, key, value, override)


def _mark(node: yaml.Node, override: str) -> None:
    """Errors name the command line instead of a line of the file, and paths are relative to where it was typed."""
    node.override = override
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            _mark(pair[0], override)
            _mark(pair[1], override)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _mark(child, override)


def _child(node: yaml.MappingNode, key: str) -> yaml.Node | None:
    return next((value for name, value in node.value if name.value == key), None)


def _set_child(node: yaml.MappingNode, key: str, value: yaml.Node, override: str) -> None:
    name = yaml.ScalarNode("tag:yaml.org,2002:str", key)
    name.override = override
    node.value = [pair for pair in node.value if pair[0].value != key] + [(name, value)]


def _where(node: yaml.Node, source: str) -> str:
    if hasattr(node, "override"):
        return f"override {node.override!r}"
    return f"{source}:{node.start_mark.line + 1}" if node.start_mark else source


def _parse(annotation: Any, node: yaml.Node, name: str, source: str) -> Any:
    """One YAML node as a value of the annotated type; `name` is the dotted field for error messages."""
    if dataclasses.is_dataclass(annotation):
        return _parse_dataclass(annotation, node, name, source)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if node.tag == "tag:yaml.org,2002:null":
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _parse(inner, node, name, source)
    if origin is list:
        if not isinstance(node, yaml.SequenceNode):
            raise _type_error(node, name, source, "a list")
        return [_parse(arguments[0], child, f"{name}[{i}]", source) for i, child in enumerate(node.value)]
    try:
        value = _Loader("").construct_object(node, deep=True)
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{_where(node, source)}: {name}: not a plain value; put text with braces in quotes") from None
    if origin is Literal:
        if value not in arguments:
            raise _type_error(node, name, source, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin is dict:
        if not isinstance(value, dict):
            raise _type_error(node, name, source, "a mapping of keys to values")
        return value
    if annotation in (PathText, FunctionText) and type(value) is str:
        is_path = bool(value) if annotation is PathText else ".py:" in value
        base = Path.cwd() if hasattr(node, "override") else Path(source).resolve().parent
        return str(base / value) if is_path else value
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is Any or type(value) is annotation:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(annotation, "text")
    raise _type_error(node, name, source, expected)


def _type_error(node: yaml.Node, name: str, source: str, expected: str) -> UserError:
    shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
    return UserError(f"{_where(node, source)}: {name}: {shown} is not {expected}")


def _parse_dataclass(cls: type, node: yaml.Node, name: str, source: str) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise _type_error(node, name or cls.__name__, source, "a mapping of keys to values")
    annotations = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        if not isinstance(key, str):
            raise UserError(f"{_where(key_node, source)}: {name or 'config'}: a key must be a plain word")
        dotted = f"{name}.{key}" if name else key
        if key not in annotations:
            near = difflib.get_close_matches(key, annotations, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(annotations)
            raise UserError(f"{_where(key_node, source)}: unknown key {dotted!r}; {hint}")
        if key in values:
            raise UserError(f"{_where(key_node, source)}: {dotted} is set twice")
        values[key] = _parse(annotations[key], value_node, dotted, source)
    try:
        return cls(**values)
    except UserError as error:  # a range check of the dataclass's own __post_init__
        raise UserError(f"{_where(node, source)}: {name or 'config'}: {error}") from None
