"""A machine without a C++ compiler: the composed forms carry the decoder, generation and training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# One way to aggregate a loss is enough here: the others differ on the host only.
FEWER = "not sequence_mean and not sequence_sum and not constant and not token_sum and not ValueBatch"
TESTS = ["tests/models/test_decoder.py", "tests/wrapper/test_policy_objective.py", "tests/wrapper/test_generator.py"]


@pytest.mark.slow
def test_the_same_tests_pass_without_our_own_kernels():
    environment = {**os.environ, "MINDRLHF_CPU_KERNELS": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", FEWER, *TESTS]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
