"""Configurations read strictly from YAML with `a.b=c` overrides.

An unknown key, a value of the wrong type and a value out of range are each one line that names the file, the line and
the field.
"""

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from mindrlhf.config.sections import FunctionText, PathText
from mindrlhf.errors import UserError


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
        raise not_yaml(path, error) from None


def not_yaml(path: Path, error: yaml.YAMLError) -> UserError:
    """In one line, with that of the file."""
    mark = getattr(error, "problem_mark", None)
    return UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(error, 'problem', error)}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where it is missing, not JSON or not an object."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a Hugging Face checkpoint directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a JSON object; download it again")
    return values


def config_to_yaml(config: Any) -> str:
    """The whole configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def difference(there: str, here: str, ignored: typing.Sequence[str]) -> str:
    """The first fields in which two configurations in YAML differ, empty where none does.

    ignored: dotted names, or prefixes that end in a dot; `rewards[].urls` is a key of every entry of a list.
    """
    flat_there, flat_here = _flatten(yaml.safe_load(there)), _flatten(yaml.safe_load(here))
    if odd := sorted(name for name in flat_there.keys() ^ flat_here.keys() if "[" not in name):
        return f"of another job or version: {', '.join(odd[:3])} {'is' if len(odd) == 1 else 'are'} not in both"
    changed = [
        f"{name}: {flat_there.get(name)!r} there, {flat_here.get(name)!r} here"
        for name in sorted({*flat_there, *flat_here})
        if flat_there.get(name) != flat_here.get(name)
        and not any(_unnumbered(name) == one or (one.endswith(".") and name.startswith(one)) for one in ignored)
    ]
    return "; ".join(changed[:3])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            flat[f"{prefix}{name}"] = f"{len(value)} entries"
            for number, entry in enumerate(value):
                flat |= _flatten(entry, f"{prefix}{name}[{number}].")
        else:
            flat[prefix + name] = value
    return flat


def _unnumbered(name: str) -> str:
    return re.sub(r"\[\d+\]", "[]", name)


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
        fix = "text such as @ or a: b needs quotes of its own, key='\"@\"'"
        raise UserError(f"override {override!r}: the value is not YAML; {fix}") from None
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


def _parse(annotation: Any, node: yaml.Node, name: str, source: str, default: Any = None) -> Any:
    """One YAML node as a value of the annotated type; `name` is the dotted field for error messages.

    default: a dataclass's instance, which has the values of the keys that the node leaves out.
    """
    if dataclasses.is_dataclass(annotation):
        return _parse_dataclass(annotation, node, name, source, default)
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
        return os.path.normpath(base / value) if is_path else value
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is Any or type(value) is annotation:
        return value
    expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(annotation, "text")
    raise _type_error(node, name, source, expected)


def _type_error(node: yaml.Node, name: str, source: str, expected: str) -> UserError:
    shown = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
    return UserError(f"{_where(node, source)}: {name}: {shown} is not {expected}")


def _parse_dataclass(cls: type, node: yaml.Node, name: str, source: str, default: Any = None) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise _type_error(node, name or cls.__name__, source, "a mapping of keys to values")
    annotations = typing.get_type_hints(cls)
    default = cls() if default is None else default
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
        values[key] = _parse(annotations[key], value_node, dotted, source, getattr(default, key, None))
    try:
        return dataclasses.replace(default, **values)
    except UserError as error:  # a range check of the dataclass's own __post_init__
        raise UserError(f"{_where(node, source)}: {name or 'config'}: {error}") from None
