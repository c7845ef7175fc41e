"""Reward models of a second's compilation, and `mindrlhf serve-rm` as a process that a test starts and ends."""

import json
import os
import selectors
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from tests.trainer.stages import DECODER, write_rows

START_SECONDS = 120


def write_reward_model(directory: Path, mindspore, **statistics) -> Path:
    """A random reward model, score_mean and score_std as given, whose tokenizer knows the rows of the stages."""
    from dataclasses import replace

    from mindrlhf.config import BuildConfig
    from mindrlhf.trainer.roles import build

    rows = write_rows(directory.parent / f"{directory.name}.jsonl")
    policy = build(BuildConfig(DECODER, 300, [str(rows)]), 4, head="score")
    head = policy.decoder.by_name["score.weight"]
    head.set_data(mindspore.Tensor(np.random.default_rng(0).standard_normal(head.shape, np.float32)))
    policy.decoder.config = replace(policy.decoder.config, **statistics)
    policy.write(directory)
    return directory


class RewardServer:
    """`mindrlhf serve-rm` on a port of the system's choice. Ended by its own process id when the block ends."""

    def __init__(self, model: Path, *options: str, token: str = ""):
        self.model, self.options = model, options
        self.environment = {**os.environ, "MINDRLHF_REWARD_TOKEN": token}
        self.port = 0
        self.start()

    def start(self) -> None:
        """Again on the same port after the first time. Returns when it listens."""
        command = [sys.executable, "-m", "mindrlhf", "serve-rm", "--model", str(self.model), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(START_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line.startswith("listening on http://"):
            self.process.kill()
            raise AssertionError(f"the server did not start: {line}{self.process.communicate(timeout=10)[1]}")
        self.url = line.split()[-1]
        self.port = int(self.url.rpartition(":")[2])

    def health(self) -> dict:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
            return json.load(response)

    def kill(self) -> None:
        """As a crash."""
        self.process.kill()
        self.process.communicate(timeout=20)

    def stop(self, signal_number: int) -> tuple[int, str, str]:
        """Exit code, standard output after the first line, standard error."""
        self.process.send_signal(signal_number)
        output, error = self.process.communicate(timeout=30)
        return self.process.returncode, output, error

    def __enter__(self) -> "RewardServer":
        return self

    def __exit__(self, *error) -> None:
        if self.process.poll() is None:
            self.kill()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
