"""Writes the README's table of model families: runs their tests and puts what they measured between two markers.

python docs/make_families.py
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "README.md"
START, END = "<!-- families: made by docs/make_families.py -->", "<!-- end of families -->"

# Name, fixtures (the first is also trained), notes.
ROWS = (
    ("Llama 2", ("llama2", "llama_attention_bias"), ""),
    ("Llama 3", ("llama_llama3_rope",), "grouped queries, its scaling of the rotary frequencies"),
    ("Qwen2, Qwen2.5", ("qwen2_bf16_sharded", "qwen2_tied", "qwen2_yarn"), "biases, tied or not, YaRN, bfloat16 files"),
    ("Qwen3", ("qwen3",), "normalised queries and keys, heads of any width"),
    ("GLM-4", ("glm",), "rotates neighbours, half of a head; one tensor for gate and up"),
    ("GLM4-0414", ("glm4",), "as GLM-4, with norms behind attention and MLP too"),
    ("Mixtral", ("mixtral",), "experts"),
    (
        "Qwen3-MoE", ("qwen3_moe", "qwen3_moe_every_second"),
        "experts in all or some layers, weights that sum to 1 or not",
    ),
    (
        "DeepSeek-V3", ("deepseek_v3", "deepseek_v3_plain"),
        "latent attention that caches the compressed vector, dense first layers, groups of experts with a bias for the "
        "choice, shared experts, YaRN",
    ),
    ("Baichuan2-7B", ("baichuan2",), "one tensor for q, k and v; a head of rows of length 1"),
    ("GPT-2", ("gpt2",), "learned positions, layer norms, GELU, matrices stored [in, out]"),
)  # fmt: skip
ERRORS = {"logits": "logits", "gradients": "gradients", "cached decode": "cached decode", "reward head": "reward head"}
DONE = {"GRPO step": "GRPO", "DPO step": "DPO", "round trip": "byte-equal round trip"}


def rounded_up(error: float) -> str:
    """To 1, 2 or 5 times a power of ten, so that another machine's last bits do not change the table."""
    if error == 0:
        return "0"
    exponent = math.floor(math.log10(error))
    digit = next((digit for digit in (1, 2, 5) if error <= digit * 10.0**exponent), None)
    return f"{digit}e{exponent}" if digit else f"1e{exponent + 1}"


def model_type(fixture: str) -> str:
    return json.loads((ROOT / "tests" / "fixtures" / fixture / "config.json").read_text(encoding="utf-8"))["model_type"]


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """measured: fixture -> quantity -> largest error, or 0 for what was done."""
    header = ("family", "`model_type`", *ERRORS.values(), *DONE.values(), "notes")
    lines = [header, ("---",) * len(header)]
    for name, fixtures, notes in ROWS:
        found = [measured[fixture] for fixture in fixtures]
        errors = [[one[quantity] for one in found if quantity in one] for quantity in ERRORS]
        done = [any(quantity in one for one in found) for quantity in DONE]
        lines.append(
            (
                name,
                f"`{model_type(fixtures[0])}`",
                *(rounded_up(max(values)) if values else "-" for values in errors),
                *("yes" if one else "-" for one in done),
                notes,
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "families.json"
        tests = ["tests/models/test_families.py", "--families-report", str(report)]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, check=True)
        measured = json.loads(report.read_text(encoding="utf-8"))
    text = TARGET.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    assert rest and after, f"{TARGET} lacks {START} or {END}"
    TARGET.write_text(f"{before}{START}\n{table(measured)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
