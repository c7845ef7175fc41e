"""Show versions and hardware, and what is missing or does not fit; exit code 1 if something required is."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mindrlhf.cli.main import package_version
from mindrlhf.utils.parallel import device_target, usable_cores

SHOWN = ("mindspore", "mindformers", "numpy", "transformers")
OPTIONAL = {
    "wandb": "logging.wandb",
    "swanlab": "logging.swanlab",
    "math-verify": "symbolic comparison of answers in your own reward functions",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    report = environment()
    print(json.dumps(report, indent=2) if arguments.json else _as_text(report))
    return 1 if report["problems"] else 0


def environment() -> dict[str, Any]:
    """What the command prints; memory in GiB. Packages are looked up, not imported."""
    memory = _memory()
    return {
        "python": platform.python_version(),
        "mindrlhf": package_version(),
        **{name: _installed(name) for name in SHOWN},
        "device": device_target(),
        "cores": usable_cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or usable_cores()),
        "memory_total_gib": memory.get("MemTotal"),
        "memory_available_gib": memory.get("MemAvailable"),
        "compiler": _compiler(),
        "optional": {name: _installed(name) for name in OPTIONAL},
        "problems": _problems(),
    }


def _as_text(report: dict[str, Any]) -> str:
    rows = [(name, report[name] or "missing") for name in ("python", "mindrlhf", *SHOWN, "device")]
    rows.append(("cores", f"{report['cores']} usable, {report['threads']} threads"))
    if report["memory_total_gib"] is not None:
        memory = f"{report['memory_total_gib']} GiB, {report['memory_available_gib']} GiB available"
        rows.append(("memory", memory))
    missing_compiler = "missing: the CPU kernels are replaced by slower MindSpore operators"
    rows.append(("g++", report["compiler"] or missing_compiler))
    for name, version in report["optional"].items():
        rows.append((name, version or f"missing, optional ({OPTIONAL[name]}): pip install {name}"))
    rows.append(("torch", "not needed"))
    lines = [f"{name:<14}{text}" for name, text in rows]
    if report["problems"]:
        lines += ["", "problems:", *(f"  {problem}" for problem in report["problems"])]
    return "\n".join(lines)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problems() -> list[str]:
    """One line for each requirement of the package that is not met; setup.py is where they are written."""
    try:
        declared = importlib.metadata.requires("mindrlhf") or []
    except importlib.metadata.PackageNotFoundError:
        return ["mindrlhf is not installed, so its requirements are unknown: pip install -e ."]
    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, declared):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed(requirement.name)
        found = "missing" if version is None else f"{version} does not fit"
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problems.append(f'{requirement.name}: {found}: pip install "{requirement.name}{requirement.specifier}"')
    return problems


def _memory() -> dict[str, float]:
    """MemTotal and MemAvailable in GiB; empty where there is no /proc."""
    source = Path("/proc/meminfo")
    if not source.is_file():
        return {}
    fields = (line.split() for line in source.read_text().splitlines())
    return {field[0].rstrip(":"): round(int(field[1]) / 2**20, 1) for field in fields}


def _compiler() -> str | None:
    """The version of g++, which builds the CPU kernels."""
    if shutil.which("g++") is None:
        return None
    done = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True)
    return done.stdout.strip()
