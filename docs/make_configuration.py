"""Writes docs/configuration.md from the dataclasses of mindrlhf/config/ and the comments beside their fields.

    python docs/make_configuration.py

tests/test_docs.py fails where the committed file is another.
"""

import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindrlhf import config  # noqa: E402
from mindrlhf.cli.train import JOBS  # noqa: E402

TARGET = Path(__file__).with_name("configuration.md")

# Meanings of fields that have no comment beside them; a comment there wins.
MEANINGS = {
    "OnlineConfig.seed": "of the weights, the order of the data and the sampling",
    "OnlineConfig.output": "directory of the run, relative to where the command is typed; default `runs/` and the job",
    "TrainingConfig.schedule": "of the learning rate, over the steps of the run",
    "LoraConfig.alpha": "the adapters are scaled by alpha / rank",
    "KTOLossConfig.beta": "how strongly the policy is held to the reference",
    "KTOLossConfig.desirable_weight": "of the answers that were liked",
    "KTOLossConfig.undesirable_weight": "of the answers that were not",
    "InferenceConfig.seed": "of the sampling",
    "InferenceConfig.max_prompt_tokens": "the window: a longer prompt is an error",
    "InferenceConfig.sampling": "keys of [`rollout.sampling`](#rolloutsampling)",
    "InferenceConfig.data": "keys of [`data`](#data); the prompts are `data.test`, which `--data` sets",
    "InferenceConfig.rewards": "of `eval`; pass@k and maj@k are by the first one. Keys of [`rewards`](#rewards)",
    "WarmupConfig.learning_rate": "peak; a cosine to a tenth of it over `steps`",
    "DataConfig.train": "files to train on",
    "SamplingConfig.top_p": "smallest set of tokens that has this probability; 1: off",
    "SamplingConfig.min_p": "tokens under this share of the likeliest one are left out; 0: off",
    "RolloutConfig.prompts_per_step": "prompts, and so groups, of one step",
    "RewardFunctionConfig.weight": "of this part in the sum",
    "AlgorithmConfig.overlong_factor": "what an answer of `max_tokens` loses",
    "TrainerConfig.best_is": "whether the best value of `best` is the largest or the smallest",
    "AlgorithmConfig.schedule": "of the learning rate, over the steps of the run",
    "AlgorithmConfig.kl_estimator": "see [algorithms.md](algorithms.md#kl-to-the-reference)",
    "OptimizerConfig.beta1": "AdamW: decay of the first moment",
    "OptimizerConfig.beta2": "AdamW: decay of the second moment",
    "OptimizerConfig.epsilon": "AdamW: added to the root of the second moment",
    "LoggingConfig.tensorboard": "event files in `tb/`",
}

HEAD = """# Configuration

<!-- Made by docs/make_configuration.py from mindrlhf/config/. Edit that, not this. -->

A job is a YAML file, with overrides behind it on the command line:

```sh
mindrlhf grpo --config examples/grpo/arithmetic.yaml algorithm.learning_rate=1e-5 trainer.steps=50
```

- A key that does not exist, a value of another type and a key that a YAML sets twice are errors: one line with file,
  line and field, exit code 2. A misspelt key is answered with the nearest one.
- An override is `section.key=value`; of two for one key the last counts. The value is YAML:
  `data.train='[{path: a.jsonl}, {path: b.jsonl}]'`. A list is replaced as a whole. `key=` sets the empty text.
- A *path* in a YAML is relative to the YAML, a path in an override to where you are.
- `1e-5` is a number here, as in YAML 1.2.
- The run writes the whole configuration, defaults included, to `config.yaml` in its output directory.
- A default written as `row` is the one of the algorithm's row, see [algorithms.md](algorithms.md).
"""

INFERENCE = """
## `generate`, `eval` and `chat`

They take overrides of the keys below, and `--config FILE` with a YAML of them.

```sh
mindrlhf eval --model runs/demo/checkpoints/step-000070 --data examples/grpo/data/arithmetic_test.jsonl \\
  --k 1,8 num_generations=8 sampling.max_tokens=32
```

`eval` with one answer a problem is greedy unless `sampling.temperature` or `--config` is given. The prompt and
`sampling.max_tokens` together must fit the model's window (`max_position_embeddings`).
"""

VARIABLES = """
## Environment variables

| variable | meaning |
| --- | --- |
| `MINDRLHF_DEVICE` | `CPU` (default) or `Ascend`, see [devices.md](devices.md) |
| `MINDRLHF_CPU_KERNELS` | `0`: MindSpore's own operators in place of our CPU kernels |
| `MINDRLHF_COMPILE_CACHE` | for `mindrlhf-graphs/`, compiled graphs; default in `~/.cache/mindrlhf`; `0`: none |
| `CXX` | the C++ compiler of the CPU kernels; default `g++`, then `c++` |
| `XDG_CACHE_HOME` | the compiled kernels lie in `mindrlhf/` below it; default `~/.cache` |
| `OMP_NUM_THREADS` | threads; default the usable cores |
| `GLOG_v` | MindSpore's log level; default 3, errors only |
| `LOG_MF_PATH` | where MindFormers writes its logs; default below the temporary directory |
"""


def main() -> None:
    TARGET.write_text(configuration(), encoding="utf-8")
    print(TARGET)


def configuration() -> str:
    """The content of docs/configuration.md."""
    found: dict[tuple[str, type], list[str]] = {}  # section -> the jobs that have it
    for job in JOBS:
        for section in _sections(_config(job)):
            found.setdefault(section, []).append(job)
    top = [section for section in found if not section[0]]
    parts = [HEAD, "\n## The jobs\n", _jobs(), _section("", config.OnlineConfig, "")]
    for name, cls in found:
        if (name, cls) not in top:
            twins = [other for other in found if other[0] == name]
            parts.append(_section(name, cls, f" of `{found[name, cls][0]}`" if len(twins) > 1 else ""))
    return "".join(parts) + INFERENCE + _table(config.InferenceConfig, "") + VARIABLES


def _config(job: str) -> type:
    return getattr(config, JOBS[job].config)


def _jobs() -> str:
    """Which sections each job has."""
    lines = ["", "| job | class | sections besides `seed` and `output` |", "| --- | --- | --- |"]
    for job in JOBS:
        fields = [field.name for field in dataclasses.fields(_config(job)) if field.name not in ("seed", "output")]
        lines.append(f"| `mindrlhf {job}` | `{_config(job).__name__}` | " + ", ".join(f"`{n}`" for n in fields) + " |")
    return "\n".join(lines) + "\n"


def keys(cls: type) -> set[str]:
    """Every dotted key of a configuration, those of sections included."""
    found = set()
    for name, section in _sections(cls):
        prefix = f"{name}." if name else ""
        found |= {prefix + field.name for field in dataclasses.fields(section)}
    return found


def _sections(cls: type, name: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of a configuration and, depth first, of everything in it; elements of lists too."""
    yield name, cls
    for field, annotation in typing.get_type_hints(cls).items():
        inner = _dataclass_in(annotation)
        if inner is not None and inner is not config.SourceConfig:
            yield from _sections(inner, f"{name}.{field}" if name else field)
    if cls is config.DataConfig:
        yield "data.train", config.SourceConfig


def _dataclass_in(annotation: typing.Any) -> type | None:
    candidates = (annotation, *typing.get_args(annotation))
    return next((one for one in candidates if dataclasses.is_dataclass(one)), None)


def _section(name: str, cls: type, whose: str) -> str:
    if not name:  # its other keys are the sections
        seed_and_output = [
            line for line in _table(cls, name).splitlines() if not re.match(r"\| `(?!seed|output)", line)
        ]
        return "\n### At the top\n" + "\n".join(seed_and_output) + "\n"
    lines = ["", f"### `{name}`{whose}"]
    if cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("):
        lines += ["", " ".join(cls.__doc__.split())]
    if cls is config.SourceConfig:
        lines += ["", "`data.train`, `data.test` and `warmup.train` are lists of these."]
    if name == "rewards":
        lines += ["", "A list; the reward is the weighted sum of its parts."]
    return "\n".join(lines) + "\n" + _table(cls, name)


def _table(cls: type, section: str) -> str:
    comments, hints = _comments(cls), typing.get_type_hints(cls)
    lines = ["", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        meaning = comments.get(field.name) or MEANINGS.get(f"{cls.__name__}.{field.name}", "")
        inner = _dataclass_in(hints[field.name])
        if inner is not None and inner is not config.SourceConfig and not meaning:
            dotted = f"{section}.{field.name}" if section else field.name
            meaning = f"[`{dotted}`](#{dotted.replace('.', '')})"
        default = _default(field, inner)
        if field.default is None and cls is not config.AlgorithmConfig:
            default = "`null`"
        row = (f"`{field.name}`", _type(hints[field.name]), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment at the end of its line."""
    source = Path(inspect.getsourcefile(cls)).read_text(encoding="utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    found = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            rest = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode()
            found[statement.target.id] = rest.partition("#")[2].strip()
    return found


def _type(annotation: typing.Any) -> str:
    names = {int: "integer", float: "number", bool: "true or false", str: "text", config.PathText: "path"}
    if annotation in names:
        return names[annotation]
    if annotation is config.FunctionText:
        return "name or path.py:function"
    if dataclasses.is_dataclass(annotation):
        return "section"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return "list of sections" if dataclasses.is_dataclass(arguments[0]) else f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    (inner,) = (argument for argument in arguments if argument is not type(None))
    return _type(inner)


def _default(field: dataclasses.Field, inner: type | None) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    else:
        value = field.default_factory()
        if inner is not None:
            return (
                "one `accuracy`"
                if value == [config.RewardFunctionConfig("accuracy")]
                else "`[]`"
                if value == []
                else ""
            )
    if value is None:
        return "`row`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if value == "" else f"`{value!r}`" if value == "\n" else f"`{value}`"


if __name__ == "__main__":
    main()
