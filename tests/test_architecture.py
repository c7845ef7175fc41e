"""The floors of the design, held up by the syntax trees of the files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mindrlhf"
FLOORS = {
    "types": 0, "config": 0, "errors": 0,
    "advantages": 1, "schedules": 1, "rewards": 1, "data": 1, "losses": 1, "preference_losses": 1, "environments": 1,
    "layout": 1,
    "models": 2, "utils": 2,
    "wrapper": 3, "planner": 3,
    "trainer": 4,
    "cli": 5, "launch": 5,
    "__main__": 6,
}  # fmt: skip
# Two rooms of one floor. A config error is a UserError; checkpoints are model directories with more in them, so
# utils/checkpoint.py reads and writes them through models. Files that users bring are imported in one place, rewards.
BESIDE = {("config", "errors"), ("utils", "models"), ("models", "utils"), ("environments", "rewards")}
LOSSES = {"losses", "preference_losses"}  # on floor 1, but MindSpore functions
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def room_of(path):
    """The top-level module or folder of mindrlhf that the file belongs to; None for mindrlhf/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return None if first == "__init__.py" else first.removesuffix(".py")


def imported_modules(path):
    """(line, dotted name) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: write the import with its full name"
            if node.module == "mindrlhf":
                yield from ((node.lineno, f"mindrlhf.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


def test_files_are_found():
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_has_a_floor(path):
    assert room_of(path) in {*FLOORS, None}, f"{name_of(path)}: give its room a floor in FLOORS"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    room = room_of(path)
    wrong = []
    for line, module in imported_modules(path):
        if not module.startswith("mindrlhf."):
            continue
        other = module.split(".")[1]
        allowed = room is None or other == room or FLOORS[other] < FLOORS[room] or (room, other) in BESIDE
        losses_beside_models = "models" in (room, other) and LOSSES & {room, other}
        if losses_beside_models or not allowed:
            wrong.append(f"{name_of(path)}:{line}: {room} may not import {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lower_floors_do_without_mindspore(path):
    room = room_of(path)
    if room is not None and (FLOORS[room] > 1 or room in LOSSES):
        return
    used = [(line, module) for line, module in imported_modules(path) if module.split(".")[0] == "mindspore"]
    assert not used, f"{name_of(path)}:{used[0][0]}: floors 0 and 1 do without mindspore"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_and_sizes(path):
    assert path.name != "utils.py", f"{name_of(path)}: name it after what it does"
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    assert lines < MOST_LINES, f"{name_of(path)}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines < MOST_FUNCTION_LINES, f"{name_of(path)}:{node.lineno}: {node.name} has {lines} lines"


def test_only_parallel_touches_the_context():
    names = ("set_context", "set_device", "threads_num", "set_auto_parallel_context")
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", None))
            if name in names and name_of(path) != "mindrlhf/utils/parallel.py":
                wrong.append(f"{name_of(path)}:{node.lineno}: {name} belongs into mindrlhf/utils/parallel.py")
    assert not wrong, "\n".join(wrong)
