"""Reward functions that users bring: loading them, and calling them in OpenRLHF's or in TRL's form."""

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.rewards.rules import accuracy_reward, format_reward
from mindrlhf.types import Prompt

BUILTINS: dict[str, Callable] = {"accuracy": accuracy_reward, "format": format_reward}


def load_reward_function(spec: str, base: Path) -> Callable:
    """A function of this package by name ("accuracy", "format"), or "path.py:function", path relative to base.

    Raises UserError for an unknown name, a missing file or function, and whatever importing the file raises.
    """
    if spec in BUILTINS:
        return BUILTINS[spec]
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name:
        near = difflib.get_close_matches(spec, BUILTINS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BUILTINS)}"
        raise UserError(f"reward function {spec!r}: no such name; {hint} Your own is written path.py:function")
    path = (Path(base) / file).resolve()
    if not path.is_file():
        raise UserError(f"reward function {spec!r}: no such file {path}")
    module = _import_file(path, spec)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "it defines " + (", ".join(functions) or "no function")
        raise UserError(f"reward function {spec!r}: {path} has no {name!r}; {hint}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"reward function {spec!r}: {name} in {path} is a {type(function).__name__}, not a function")
    return function


def call_reward_function(function: Callable, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
    """Call a reward function in the form that its signature asks for, and return what it returns.

    A parameter named `queries` means OpenRLHF's form, function(queries, prompts, labels): lists of prompt text +
    completion, prompt text and label, by position; further parameters and **kwargs get columns by name.

    Otherwise TRL's form, function(prompts=..., completions=..., **columns), all by keyword: lists of prompt text and
    completion, `label` and `labels` (both the data set's label column) and every column of the data set's rows, under
    its own name. A function without **kwargs gets only what it names. A row that lacks a column has None there.
    """
    parameters = inspect.signature(function).parameters
    texts = [prompt.text for prompt in prompts]
    labels = [prompt.label for prompt in prompts]
    names = dict.fromkeys(key for prompt in prompts for key in prompt.row)
    values: dict[str, Any] = {name: [prompt.row.get(name) for prompt in prompts] for name in names}
    values |= {"prompts": texts, "completions": list(completions), "labels": labels}
    if "label" not in values or any(label is not None for label in labels):
        values["label"] = labels
    positional: list[Any] = []
    if "queries" in parameters:
        values["queries"] = [text + completion for text, completion in zip(texts, completions, strict=True)]
        positional = _openrlhf_arguments(parameters, values)
    remaining = list(parameters.values())[len(positional) :]
    named = [parameter for parameter in remaining if parameter.kind in _NAMED]
    missing = [parameter.name for parameter in named if parameter.default is parameter.empty]
    missing = [name for name in missing if name not in values]
    if missing:
        raise UserError(
            f"the function asks for {', '.join(map(repr, missing))}, which is no column of the data set; "
            f"it can have prompts, completions, label, labels" + "".join(f", {name}" for name in names)
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in remaining):
        taken = {*_OPENRLHF, *list(parameters)[:3]} if positional else set()
        values = {name: value for name, value in values.items() if name not in taken}
    else:
        values = {parameter.name: values[parameter.name] for parameter in named if parameter.name in values}
    return function(*positional, **values)


def exception_line(error: BaseException, file: str | None) -> str:
    """`file:line: Type: message` of where an exception rose: the deepest frame in `file`, else the deepest at all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == file]
    where = ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}: "
    elif own or frames:
        frame = (own or frames)[-1]
        where = f"{frame.filename}:{frame.lineno}: "
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{where}{type(error).__name__}{': ' if message else ''}{message}"


def source_code(function: Callable) -> CodeType | None:
    """The code of a function, a partial, a bound method or an object with __call__; None where it is not Python's."""
    function = inspect.unwrap(getattr(function, "func", function))
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_OPENRLHF = ("queries", "prompts", "labels")


def _openrlhf_arguments(parameters: Any, values: dict[str, Any]) -> list[Any]:
    """The positional arguments: all three where `queries` comes first and two more follow, else none (by name).

    By position as OpenRLHF does: the second and third may have any name.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in parameters.items() if parameter.kind in kinds]
    return [values[name] for name in _OPENRLHF] if names[:1] == ["queries"] and len(names) >= 3 else []


def _import_file(path: Path, spec: str) -> Any:
    # A name of its own for every file: two files called reward.py are two modules. Registered, so that the module's
    # dataclasses and pickles work.
    name = f"mindrlhf_reward_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None:
        raise UserError(f"reward function {spec!r}: {path} is not a Python file, its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"reward function {spec!r}: importing it: {exception_line(error, str(path))}") from error
    return module
