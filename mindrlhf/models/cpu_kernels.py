"""Our own CPU kernels as MindSpore primitives, compiled where they are first needed.

`PRIMITIVES` is None where they cannot be had: another device, no C++ compiler, or MINDRLHF_CPU_KERNELS=0. Then
models/kernels.py computes the same from MindSpore's own primitives, and `available()` says why.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
from mindspore import ops

from mindrlhf.utils.parallel import device_target

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("cpu_kernels.h", "cpu_kernels.cpp", "cpu_attention.cpp", "cpu_experts.cpp")
)
LANES = 16  # kLanes of cpu_kernels.h
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-pthread", "-shared", "-fPIC")


def available() -> str | None:
    """None where the kernels are in use, otherwise why not."""
    return _REASON


def _load() -> tuple[SimpleNamespace | None, str | None]:
    if os.environ.get("MINDRLHF_CPU_KERNELS") == "0":
        return None, "MINDRLHF_CPU_KERNELS=0 turned them off"
    # This module may be imported before the device is set, or after a program has set another one.
    for device in (device_target(), ms.get_context("device_target")):
        if device != "CPU":
            return None, f"the device is {device}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None, "no C++ compiler (g++) is installed"
    try:
        return _primitives(_compiled(compiler)), None
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: no home directory
        message = (getattr(error, "stderr", None) or "").strip() or str(error)
        return None, f"{compiler} failed: {message.splitlines()[0]}"


def _compiled(compiler: str) -> Path:
    """The shared library, from the user's cache where the same source was compiled for the same CPU before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [path.read_bytes() for path in SOURCES] + [" ".join(FLAGS).encode(), version.encode(), _cpu().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindrlhf"
    library = cache / f"cpu_kernels-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    # Beside it and renamed: whoever looks sees a whole library or none, and of two processes either's will do.
    with tempfile.TemporaryDirectory(dir=cache) as directory:
        made = Path(directory) / library.name
        command = [compiler, *FLAGS, "-o", str(made), *(str(path) for path in SOURCES if path.suffix == ".cpp")]
        subprocess.run(command, capture_output=True, text=True, check=True)
        made.replace(library)
    return library


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _first(x, *_):
    return x


def _two(x, y, *_):
    return x, y


def _three(x, y, z, *_):
    return x, y, z


def _primitives(library: Path) -> SimpleNamespace:
    """One ops.Custom a kernel; shapes and types of the inputs give those of the outputs."""

    def primitive(name: str, shapes, types, bprop=None):
        return ops.Custom(f"{library}:{name}", shapes, types, func_type="aot", bprop=bprop)

    def attention_shapes(query, key, value, positions, *_):
        return query, (positions[0], query[1], positions[1])

    def expert_shapes(x, best, shares, gate, *_):
        pairs, width, inner = x[0] * best[1], x[1], gate[1] * gate[2] // x[1]
        return x, (pairs, inner), (pairs, inner), (pairs, width + inner + 2 * LANES)

    def three_shapes(x, *parameters):
        return tuple((x[0], shape[1]) for shape in parameters if len(shape) == 2)

    float32, int32 = ms.float32, ms.int32
    bprops = _bprops(primitive)
    return SimpleNamespace(
        projection=primitive("projections", lambda x, w, *_: (x[0], w[1]), _first),
        three_projections=primitive("projections", three_shapes, _three),
        gated_projection=primitive("gated_projection", lambda x, gate, up: (x[0], gate[1]), _first),
        residual_projection=primitive("residual_projection", lambda x, w, residual, *_: residual, _first),
        rms_norm=primitive("rms_norm", _first, _first, bprops.rms_norm),
        swiglu=primitive("swiglu", _first, _first, bprops.swiglu),
        rotate=primitive("rotate", _first, _first, bprops.rotate),
        add_bias=primitive("add_bias", _first, _first, bprops.add_bias),
        attention=primitive("attention", attention_shapes, lambda query, *_: (query, query), bprops.attention),
        decode_attention=primitive("decode_attention", _first, _first),
        expert_mlp=primitive("expert_mlp", expert_shapes, lambda x, *_: (x, x, x, x), bprops.expert_mlp),
        squared_sum=primitive("squared_sum", lambda x: (1,), _first),
        adamw=primitive("adamw", lambda *_: (1,), _first),
        target_logprobs=primitive(
            "target_logprobs",
            lambda x, *_: (x[:1], x[:1], x[:1]),
            lambda *_: (float32, float32, float32),
            bprops.target_logprobs,
        ),
        target_logprobs_gradient=bprops.target_logprobs_gradient,
        sample=primitive("sample", lambda x, *_: (x[:1], x[:1]), lambda *_: (int32, float32)),
    )


def _bprops(primitive) -> SimpleNamespace:
    """How each kernel that is trained through passes gradients on: kernels again; 0 for what is no parameter."""

    def expert_shapes(x, best, shares, gate, up, down, *_):
        memory = (x[0] * best[1], 2 * x[1] + 3 * gate[1] * gate[2] // x[1] + 5 * LANES)
        return x, shares, gate, up, down, memory

    rms_norm_gradient = primitive("rms_norm_gradient", _two, _two)
    swiglu_gradient = primitive("swiglu_gradient", _two, _two)
    rotate_gradient = primitive("rotate_gradient", _first, _first)
    attention_gradient = primitive("attention_gradient", _three, _three)
    expert_mlp_gradient = primitive("expert_mlp_gradient", expert_shapes, lambda x, *_: (x,) * 6)
    column_sums = primitive("column_sums", lambda g: g[1:], _first)
    target_logprobs_gradient = primitive("target_logprobs_gradient", _first, _first)

    def rms_norm(x, weight, epsilon, out, dout):
        dx, dweight = rms_norm_gradient(x, weight, dout, epsilon)
        return dx, dweight, ops.zeros_like(epsilon)

    def swiglu(gate, up, out, dout):
        return swiglu_gradient(gate, up, dout)

    def rotate(x, cos, sin, out, dout):
        return rotate_gradient(dout, cos, sin), ops.zeros_like(cos), ops.zeros_like(sin)

    def add_bias(x, bias, out, dout):
        return dout, column_sums(dout)

    def attention(query, key, value, positions, segments, scale, out, dout):
        attended, log_totals = out
        gradients = attention_gradient(query, key, value, positions, segments, scale, attended, log_totals, dout[0])
        return gradients + (ops.zeros_like(positions), ops.zeros_like(segments), ops.zeros_like(scale))

    def expert_mlp(x, best, shares, gate, up, down, settings, out, dout):
        _, gates, ups, _ = out
        gradients = expert_mlp_gradient(x, best, shares, gate, up, down, settings, gates, ups, dout[0])
        return gradients[:1] + (ops.zeros_like(best),) + gradients[1:5] + (ops.zeros_like(settings),)

    def target_logprobs(logits, labels, temperature, out, dout):
        _, entropy, log_total = out
        gradient = target_logprobs_gradient(logits, labels, temperature, entropy, log_total, dout[0], dout[1])
        return gradient, ops.zeros_like(labels), ops.zeros_like(temperature)

    return SimpleNamespace(
        rms_norm=rms_norm,
        swiglu=swiglu,
        rotate=rotate,
        add_bias=add_bias,
        attention=attention,
        expert_mlp=expert_mlp,
        target_logprobs=target_logprobs,
        target_logprobs_gradient=target_logprobs_gradient,
    )


PRIMITIVES, _REASON = _load()
