"""Reward functions that users bring: loading them, and calling them in OpenRLHF's or in TRL's form."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

from mindrlhf.errors import UserError
from mindrlhf.types import Prompt

# The functions of this package by name, each as module:function, imported when used.
BUILTINS = {
    "accuracy": "mindrlhf.rewards.rules:accuracy_reward",
    "math": "mindrlhf.rewards.math_equality:math_reward",
    "format": "mindrlhf.rewards.rules:format_reward",
    "length": "mindrlhf.rewards.style:length_reward",
    "cosine_length": "mindrlhf.rewards.style:cosine_length_reward",
    "repetition": "mindrlhf.rewards.style:repetition_reward",
    "knights_and_knaves": "mindrlhf.rewards.logic:knights_and_knaves_reward",
}


def load_reward_function(spec: str, base: Path, arguments: Mapping[str, Any] | None = None) -> Callable:
    """A function of this package by its name in BUILTINS, or "path.py:function", path relative to base.

    arguments: by keyword, bound to the function; they win over columns of the data set.

    Raises UserError for an unknown name, a missing file or function, whatever importing the file raises, an argument
    that the function does not take, and a package that it needs and that is missing.
    """
    if spec in BUILTINS:
        module, _, name = BUILTINS[spec].partition(":")
        module = importlib.import_module(module)
        if spec == "math":
            module.require_math_verify()  # here and not at the first answer, after the model has been loaded
        function = getattr(module, name)
    else:
        function = _load_own(spec, base)
    return _bind(spec, function, dict(arguments or {}))


def _load_own(spec: str, base: Path) -> Callable:
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name:
        near = difflib.get_close_matches(spec, BUILTINS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(BUILTINS)}."
        raise UserError(f"reward function {spec!r}: no such name; {hint} Your own is written path.py:function")
    function = load_from_file(spec, base, "reward function", inspect.isfunction)
    if not callable(function):
        path = (Path(base) / file).resolve()
        raise UserError(f"reward function {spec!r}: {name} in {path} is a {type(function).__name__}, not a function")
    return function


def load_from_file(spec: str, base: Path, what: str, is_one: Callable[[Any], bool]) -> Any:
    """`name` of the file in a spec "path.py:name", path relative to base.

    what: what the spec stands for, in errors; is_one: whether a thing in the file is such, for their hints.
    Raises UserError for a missing file or name, and whatever importing the file raises.
    """
    file, _, name = spec.rpartition(":")
    path = (Path(base) / file).resolve()
    if not path.is_file():
        raise UserError(f"{what} {spec!r}: no such file {path}")
    module = _import_file(path, f"{what} {spec!r}")
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if is_one(value)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "it defines " + (", ".join(known) or f"no {what.split()[-1]}")
        raise UserError(f"{what} {spec!r}: {path} has no {name!r}; {hint}")
    return getattr(module, name)


def _bind(spec: str, function: Callable, arguments: dict[str, Any]) -> Callable:
    if not arguments and spec not in BUILTINS:
        return function
    parameters = list(inspect.signature(function).parameters.values())
    # The **columns of a function of this package are for the data set's; what can be set is keyword-only there.
    kinds = (inspect.Parameter.KEYWORD_ONLY,) if spec in BUILTINS else _NAMED
    known = {parameter.name: parameter.default for parameter in parameters if parameter.kind in kinds}
    takes_any = spec not in BUILTINS and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    unknown = [str(name) for name in arguments if name not in known and not takes_any]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
        raise UserError(f"reward function {spec!r} has no argument {unknown[0]!r}; {hint}")
    if spec in BUILTINS:
        arguments = known | arguments  # the defaults too: a column of such a name is another thing
        missing = [name for name, value in arguments.items() if value is inspect.Parameter.empty]
        if missing:
            raise UserError(f"reward function {spec!r} needs a value for {missing[0]!r} in its arguments")
    return functools.partial(function, **arguments) if arguments else function


def call_reward_function(function: Callable, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
    """Call a reward function in the form that its signature asks for, and return what it returns.

    A parameter named `queries` means OpenRLHF's form, function(queries, prompts, labels): lists of prompt text +
    completion, prompt text and label, by position; further parameters and **kwargs get columns by name.

    Otherwise TRL's form, function(prompts=..., completions=..., **columns), all by keyword: lists of prompt text and
    completion, `label` and `labels` (both the data set's label column) and every column of the data set's rows, under
    its own name. A function without **kwargs gets only what it names. A row that lacks a column has None there.
    What is bound to a partial already is not given again.
    """
    parameters = inspect.signature(function).parameters
    texts = [prompt.text for prompt in prompts]
    labels = [prompt.label for prompt in prompts]
    names = dict.fromkeys(key for prompt in prompts for key in prompt.row)
    values: dict[str, Any] = {name: [prompt.row.get(name) for prompt in prompts] for name in names}
    values |= {"prompts": texts, "completions": list(completions), "labels": labels}
    if "label" not in values or any(label is not None for label in labels):
        values["label"] = labels
    bound = function.keywords if isinstance(function, functools.partial) else {}
    values = {name: value for name, value in values.items() if name not in bound}  # a bound argument wins
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


def _import_file(path: Path, where: str) -> Any:
    # A name of its own for every file: two files called reward.py are two modules. Registered, so that the module's
    # dataclasses and pickles work.
    name = f"mindrlhf_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None:
        raise UserError(f"{where}: {path} is not a Python file, its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{where}: importing it: {exception_line(error, str(path))}") from error
    return module
