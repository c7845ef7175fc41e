"""What write_samples.py wrote, opened by transformers and peft: the same numbers.

For a Python with torch and transformers, see check_export.py, and peft 0.17.1.
Imports nothing of mindrlhf. Prints the largest difference of each model; exit code 1 where one is over TOLERANCE.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

TOLERANCE = 1e-5  # of the largest value; both sides compute in float32


def main(directory: Path) -> int:
    expected = np.load(directory / "expected.npz")
    ids = torch.tensor(expected["ids"], dtype=torch.long)
    failed = False
    for name in sorted(set(expected.files) - {"ids"}):
        difference = float(np.abs(computed(directory / name, ids) - expected[name]).max())
        failed |= not difference <= TOLERANCE * np.abs(expected[name]).max()
        print(f"{name}: {difference:.1e} of values up to {np.abs(expected[name]).max():.2f}")
    return int(failed)


@torch.no_grad()
def computed(path: Path, ids: torch.Tensor) -> np.ndarray:
    """Logits [2, T, V], or scores [2] of one row at a time: there is no padding token."""
    model = opened(path).eval()
    if "logits" in path.name:
        return model(input_ids=ids).logits.numpy()
    return torch.cat([model(input_ids=row[None]).logits.reshape(1) for row in ids]).numpy()


def opened(path: Path):
    if path.name.endswith("_score"):
        model, loading = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        assert not any(loading.values()), loading
        assert (model.config.score_mean, model.config.score_std) == (0.25, 3.0)
        return model
    base = path.with_name(path.name.split("_")[0] + "_base")
    if "logits" in path.name:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    # The trunk of a language model, under a score head that the adapter brings.
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=1), path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
