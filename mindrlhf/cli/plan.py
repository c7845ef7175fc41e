"""`mindrlhf plan`: what a job needs of each device, and the layouts that suit it best. Nothing is started."""

import argparse
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf.errors import UserError

if TYPE_CHECKING:
    from mindrlhf.planner.architecture import Architecture
    from mindrlhf.planner.job import Devices, Job

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
RATES = {
    "flops": "floating-point operations a second that a device reaches in matrix products, such as 120T",
    "memory_bandwidth": "bytes a second of its memory, such as 1TB",
    "interconnect": "bytes a second and device between the devices of a host",
    "network": "the same between hosts",
    "swap_bandwidth": "bytes a second between a device and its host's memory",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Bytes of each device by phase, role and kind, the bytes of a weight sync, an estimate of a step's seconds, "
        "and the fastest layouts that fit. Exit code 1 where none does. Formulas and defaults: docs/planner.md."
    )
    parser.add_argument("--config", required=True, help="a grpo or ppo job's YAML; or a model, as --model takes it")
    parser.add_argument("--devices", type=int, required=True, help="how many")
    parser.add_argument("--device-memory", required=True, help="of each, such as 64GB (10^9) or 64GiB (2^30)")
    parser.add_argument(
        "--model", help="a checkpoint directory, a config.json or a MindFormers YAML, instead of the job's own models"
    )
    parser.add_argument("--keep-layouts", action="store_true", help="no search: the layouts and rows of the config")
    parser.add_argument("--device", choices=["Ascend", "CPU"], default="Ascend", help="CPU: processes of this suite")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], help="default: bfloat16, on a CPU float32")
    for name, text in RATES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=text)
    parser.add_argument("--devices-per-host", type=int, help="(default: 8)")
    parser.add_argument("--measure", action="store_true", help="measure flops and memory bandwidth on this machine")
    parser.add_argument("--json", metavar="FILE", help="write the plan there too")
    parser.add_argument("--picture", metavar="FILE.png", help="draw it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example rollout.slots=128")


def run(arguments: argparse.Namespace) -> int:
    from mindrlhf.planner.report import as_json, as_text, verdict
    from mindrlhf.planner.search import make_plan, search

    if arguments.picture and not arguments.picture.endswith((".png", ".svg", ".pdf")):
        raise UserError(f"--picture {arguments.picture}: name a file that ends in .png, .svg or .pdf")
    devices = read_devices(arguments)
    config = read_config(arguments.config, arguments.overrides)
    job = read_job(config, arguments.model or _model(arguments.config))
    if arguments.keep_layouts:
        plan = make_plan(job, devices, configured(config, job, devices.count))
    else:
        plan = search(job, devices)
    print(as_text(plan))
    print(f"\n{verdict(plan)}")
    if arguments.json:
        _write(arguments.json, lambda path: path.write_text(json.dumps(as_json(plan), indent=2) + "\n", "utf-8"))
    if arguments.picture:
        from mindrlhf.planner.picture import plot_plan

        title = f"{Path(arguments.model or arguments.config).name}: {devices.count} devices"
        _write(arguments.picture, lambda path: plot_plan(plan, path, title))
    return 0 if plan.overrun <= 0 else 1


def read_devices(arguments: argparse.Namespace) -> "Devices":
    """From the options. Raises UserError."""
    from mindrlhf.planner.job import Devices

    given: dict[str, Any] = {}
    if arguments.measure:
        given = measured_rates()
    for name in RATES:
        text = getattr(arguments, name)
        if text:
            given[name] = quantity(text, f"--{name.replace('_', '-')}", SCALES if name == "flops" else UNITS)
    if arguments.devices_per_host is not None:
        given["devices_per_host"] = arguments.devices_per_host
    on_host = arguments.device == "CPU"
    memory = quantity(arguments.device_memory, "--device-memory", {unit: UNITS[unit] for unit in UNITS if unit})
    precision = arguments.precision or ("float32" if on_host else "bfloat16")
    return Devices(arguments.devices, int(memory), precision, on_host, **given)


def quantity(text: str, option: str, units: dict[str, int]) -> float:
    """'64GB' -> 64e9. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in units:
        known = ", ".join(unit for unit in units if unit)
        raise UserError(f"{option}: {text!r} is not a number with one of the units {known}")
    return float(found[1]) * units[found[2].upper()]


def read_config(path: str, overrides: list[str]) -> Any:
    """The job's config, PPO's where it has a critic; the default GRPO job where the path is a model's."""
    from mindrlhf.config import GRPOConfig, PPOConfig, load_config

    if _model(path):
        return load_config(GRPOConfig, None, overrides)
    values = _content(path)
    if "training" in values or "distillation" in values:
        raise UserError(f"{path}: is an offline job's; the planner takes the YAML of a grpo or ppo job, or a model")
    algorithm = values.get("algorithm")
    named = algorithm.get("name") if isinstance(algorithm, dict) else None
    with_critic = "critic" in values or named == "ppo" or "algorithm.name=ppo" in overrides
    return load_config(PPOConfig if with_critic else GRPOConfig, path, overrides)


def _model(path: str) -> str | None:
    is_model = Path(path).is_dir() or path.endswith(".json") or "model_config" in (_content(path).get("model") or {})
    return path if is_model else None


def _content(path: str) -> dict[str, Any]:
    """Of a YAML; empty where it is none."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if Path(path).is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}  # load_config says what is wrong, with the line
    return values if isinstance(values, dict) else {}


def read_job(config: Any, model: str | None, architecture: "Architecture | None" = None) -> "Job":
    """model, a path, or the architecture itself: instead of those that the config names. Raises UserError."""
    from mindrlhf.planner.architecture import architecture_of, read_architecture
    from mindrlhf.planner.job import Job
    from mindrlhf.trainer.algorithms import resolve
    from mindrlhf.trainer.updates import row_tokens

    def opened(path: str) -> Any:
        return policy if model or architecture else read_architecture(path)

    build = config.model.build
    if architecture:
        policy = architecture
    elif model or config.model.path:
        policy = read_architecture(model or config.model.path)
    elif config.model.mindformers:
        policy = opened(config.model.mindformers)
    elif build.decoder:
        policy = architecture_of({**build.decoder, "vocab_size": build.vocab_size}, "model.build.decoder")
    else:
        raise UserError("model.path: empty, and so is model.build.decoder; name one of them, or give --model")
    algorithm, rollout = resolve(config.algorithm, config.rollout), config.rollout
    needs_reference = algorithm.kl_coef > 0 or config.evaluation.kl
    critic = getattr(config, "critic", None)
    own_critic = critic is not None and not critic.shared_trunk
    trainable, adapters = _trained(config.model, policy)
    return Job(
        policy=policy,
        prompts_per_step=rollout.prompts_per_step,
        num_generations=rollout.num_generations,
        prompt_tokens=rollout.max_prompt_tokens,
        answer_tokens=rollout.sampling.max_tokens,
        slots=rollout.slots,
        rows=config.trainer.rows,
        row_tokens=row_tokens(config),
        reference=(opened(config.model.reference) if config.model.reference else policy) if needs_reference else None,
        critic=(opened(critic.model) if critic.model else policy).scoring() if own_critic else None,
        reward_models=tuple(opened(reward.model).scoring() for reward in config.rewards if reward.model),
        updates=config.algorithm.updates_per_epoch,
        epochs=config.algorithm.epochs_per_rollout,
        rescore=algorithm.rescore,
        asynchronous=rollout.asynchronous,
        trainable=trainable,
        adapters=adapters,
        swap=config.memory.swap,
    )


def _trained(model: Any, policy: Any) -> tuple[Any, tuple]:
    """What is trained of the policy, None where all is; and the adapters."""
    from mindrlhf.models.lora import Lora
    from mindrlhf.planner.architecture import Weight

    lora = Lora.of(model.lora, policy)
    if lora:
        adapters = tuple(Weight(name, shape) for name, shape in lora.shapes(policy).items())
        return adapters, adapters
    if not model.train_layers:
        return None, ()
    return policy.weights_of(model.train_layers), ()


def configured(config: Any, job: "Job", devices: int) -> Any:
    """The arrangement that the config has. Raises UserError where it does not divide the model or the devices."""
    from mindrlhf.layout import Layout
    from mindrlhf.planner.job import Arrangement

    own, other = config.parallel, config.rollout.parallel
    other = replace(other, tensor=other.tensor or own.tensor, expert=other.expert or own.expert)
    if own.sequence > 1:
        raise UserError("parallel.sequence: the planner does not know the memory of its attention scores; set it to 1")
    training = Layout.of(own, devices, "parallel")
    generation = Layout.of(other, devices, "rollout.parallel")
    for layout, where in ((training, "parallel"), (generation, "rollout.parallel")):
        layout.check(job.policy, where)
    return Arrangement(training, generation, config.trainer.rows)


def measured_rates(size: int = 1536, rounds: int = 5) -> dict[str, float]:
    """Of this machine by NumPy: float32 products of [size, size] matrices, and copies of 256 MB (read and written)."""
    import numpy as np

    matrix = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)

    def best(action) -> float:
        action()
        seconds = []
        for _ in range(rounds):
            clock = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - clock)
        return min(seconds)

    flops = 2 * size**3 / best(lambda: matrix @ matrix)
    bandwidth = 2 * source.nbytes / best(lambda: np.copyto(target, source))
    print(f"measured: {flops / 1e9:.0f} GFLOP/s in float32 products, {bandwidth / 1e9:.1f} GB/s of memory")
    return {"flops": flops, "memory_bandwidth": bandwidth}


def _write(path: str, write) -> None:
    try:
        write(Path(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name another file") from None
