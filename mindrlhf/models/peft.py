"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors.

The base model is not in it, only named. Source: peft 0.17 `tuners/lora/config.py`, `utils/save_and_load.py`. Which
projections are adapted is read from the tensors' names, because adapter_config.json may say it by a regular expression.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.config.reading import read_json
from mindrlhf.errors import UserError
from mindrlhf.models.config import DecoderConfig
from mindrlhf.models.conversion import is_stored_as_it_is
from mindrlhf.models.fields import flag, integer, number
from mindrlhf.models.hf import read_tensor_file, write_tensor_file
from mindrlhf.models.lora import MODULES, A, Lora
from mindrlhf.models.shapes import SCORE
from mindrlhf.utils.checkpoint import write_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the model's own names

# Keys of adapter_config.json that change the numbers, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    # The others change the base model's weights before the adapter is added.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class SavedAdapter(NamedTuple):
    """An adapter directory's content."""

    lora: Lora
    tensors: Mapping[str, np.ndarray]  # by the names of Lora.shapes, and score.weight where there is a score head


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG_FILE).is_file()


def base_directory(directory: Path, base: str = "") -> Path:
    """The checkpoint that an adapter belongs to: `base`, or what adapter_config.json names.

    A relative name is looked for beside the adapter and then from the current directory. Raises UserError.
    """
    if base:
        if not Path(base).is_dir():
            raise UserError(f"{base}: no such checkpoint directory; give the model that {directory} belongs to")
        return Path(base)
    path = directory / CONFIG_FILE
    named = read_json(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UserError(f"{path}: base_model_name_or_path is {named!r}; set it to the base model's directory")
    for candidate in (directory / named, Path(named)):
        if candidate.is_dir():
            return candidate
    raise UserError(
        f"{path}: base_model_name_or_path is {named!r}, and there is no such directory; download the model and write "
        "its directory there"
    )


def read_adapter(directory: Path, config: DecoderConfig) -> SavedAdapter:
    """The adapter in a directory, for a base model of that config.

    Raises UserError for what cannot be honoured (other methods than LoRA, DoRA, trained biases, ranks that differ,
    trained modules other than a score head) and for tensors that do not fit the model.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {values.get('peft_type')!r} is not supported; only 'LORA' is")
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral:
            raise UserError(f"{path}: {key} {values[key]!r} is not supported; merge the adapter with peft and use that")
    for module in values.get("modules_to_save") or []:
        if module not in ("score", "classifier"):  # PEFT names both for every classifier
            raise UserError(f"{path}: modules_to_save {module!r} is not supported; only 'score' is")
    tensors = read_tensor_file(directory / TENSOR_FILE)
    entries = {name.removeprefix(PREFIX): name for name in tensors}
    found = (re.fullmatch(rf"model\.layers\.(\d+)\.\w+\.(\w+)\.{re.escape(A)}", name) for name in entries)
    adapted = {match.groups() for match in found if match}
    layers = {int(layer) for layer, _ in adapted}
    lora = Lora(
        rank=integer(values, "r", str(path)),
        alpha=number(values, "lora_alpha", str(path)),
        dropout=number(values, "lora_dropout", str(path), 0.0),
        target_modules=tuple(name for name in MODULES if any(module == name for _, module in adapted)),
        layers=() if layers == set(range(config.num_layers)) else tuple(sorted(layers)),
        rank_stabilised=flag(values, "use_rslora", str(path)),
    )
    if lora.rank < 1 or not lora.alpha > 0 or not 0 <= lora.dropout < 1 or not lora.target_modules:
        raise UserError(f"{path}: r, lora_alpha, lora_dropout or the adapted modules are out of range; save it again")
    for module in lora.target_modules:
        if not is_stored_as_it_is(config, module):
            raise UserError(
                f"{path}: adapts {module}, which model_type {config.model_type} stores in another form than it is "
                "computed in; merge the adapter with peft and use that"
            )
    _check_shapes(directory / TENSOR_FILE, lora, config, {n: tensors.shapes[key] for n, key in entries.items()})
    return SavedAdapter(lora, {name: tensors[key] for name, key in entries.items()})


def _check_shapes(path: Path, lora: Lora, config: DecoderConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    expected = lora.shapes(config)
    if SCORE in found:
        expected[SCORE] = (1, config.hidden_size)
    for name, shape in expected.items():
        if name not in found:
            raise UserError(f"{path}: lacks {name}; adapters must be on the same projections of each adapted layer")
        if found[name] != shape:
            raise UserError(f"{path}: {name} has shape {list(found[name])}, the base model makes it {list(shape)}")
    for name in found:
        if name not in expected:
            raise UserError(f"{path}: {name} is unexpected; only {', '.join(MODULES)} and score can be adapted")


def write_adapter(
    directory: Path, lora: Lora, base: str, tensors: Iterable[tuple[str, np.ndarray]], score: bool
) -> None:
    """What PEFT loads. `tensors` are Decoder.adapter_tensors; score: the model is a reward model."""
    values = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": list(lora.layers) or None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": ["score"] if score else None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.target_modules),
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "use_rslora": lora.rank_stabilised,
    }
    write_json(directory / CONFIG_FILE, values)
    sources = ((PREFIX + name, array.shape, lambda array=array: array) for name, array in tensors)
    write_tensor_file(directory / TENSOR_FILE, sources)
