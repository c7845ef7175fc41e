"""Rollout workers and reward servers on other machines, placed by Ray; needs `pip install 'mindrlhf[ray]'`.

An actor is a process of its own on one of the cluster's machines. It is one process to MindSpore too, whatever the
job that started it: nothing here meets in a collective. Imports nothing heavy, since actors import it first.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mindrlhf.config import SamplingConfig
from mindrlhf.errors import UserError
from mindrlhf.rewards.remote import TOKEN_VARIABLE
from mindrlhf.types import Prompt, Rollout
from mindrlhf.utils.parallel import STORE_VARIABLE, prepare_environment, start

if TYPE_CHECKING:
    from mindrlhf.models.decoder import Decoder

_ENVIRONMENT = {
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",  # for MindSpore; an actor's process imports Ray first
    # Of a job of several processes, from which an actor may have inherited them.
    **dict.fromkeys(("RANK_ID", "RANK_SIZE", STORE_VARIABLE, "MS_ROLE", "MS_WORKER_NUM", "MS_NODE_ID"), ""),
}


class RolloutWorker:
    """In an actor: a decoder and its generator."""

    def open(self, checkpoint: str, cpus: int, settings: Mapping[str, Any]) -> None:
        """checkpoint: a directory that this machine can read. settings: of `Generator`, `stop` as texts."""
        start(threads=cpus)
        from mindrlhf.trainer.roles import open_checkpoint
        from mindrlhf.wrapper.generator import Generator

        policy = open_checkpoint(checkpoint, head="logits")
        settings = dict(settings)
        self.generator = Generator(policy.decoder, stop_ids=policy.stop_ids(list(settings.pop("stop"))), **settings)

    def sync(self, references: Mapping[str, Any]) -> None:
        """references: to every tensor in Ray's store, by name; fetched one after the other."""
        import ray

        self.generator.sync(lambda name: ray.get(references[name]))

    def generate(self, prompts: Sequence[Prompt], count: int, sampling: SamplingConfig, seed: int) -> list[Rollout]:
        return self.generator.generate(prompts, count, sampling, seed)


class RolloutPool:
    """Generators on several machines that answer as one would.

    checkpoint: a Hugging Face directory on a disk that all machines share. workers: actors. slots and so on: of each
    one's `Generator`; stop: texts that end an answer beside the checkpoint's own tokens. cpus: cores of each actor.
    Call ray.init first. Raises UserError where Ray is not installed, and for a bad checkpoint or bad settings.
    """

    def __init__(
        self,
        checkpoint: str,
        workers: int,
        slots: int,
        max_prompt_tokens: int,
        max_tokens: int,
        stop: Sequence[str] = (),
        cpus: int = 1,
    ):
        if workers < 1:
            raise UserError(f"workers: {workers} is not 1 or more")
        self.ray = _import_ray()
        settings = dict(slots=slots, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens, stop=tuple(stop))
        self.workers = [_actor(self.ray, RolloutWorker, cpus) for _ in range(workers)]
        self._get([worker.open.remote(checkpoint, cpus, settings) for worker in self.workers])

    def sync(self, decoder: "Decoder") -> None:
        """Its weights to every actor, adapters merged; each tensor is put into Ray's store once."""
        from mindrlhf.models.shapes import expected_shapes

        references = {name: self.ray.put(decoder.weights(name)) for name in expected_shapes(decoder.config)}
        self._get([worker.sync.remote(references) for worker in self.workers])

    def generate(
        self, prompts: Sequence[Prompt], num_generations: int, sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        """The answers that one `Generator` gives, in its order. Raises UserError as it does."""
        shares = share_prompts(prompts, len(self.workers))
        asked = [
            worker.generate.remote([prompts[i] for i in share], num_generations, sampling, seed)
            for worker, share in zip(self.workers, shares, strict=True)
            if share
        ]
        rollouts: dict[int, list[Rollout]] = {i: [] for i in range(len(prompts))}
        for share, answers in zip(filter(None, shares), self._get(asked), strict=True):
            for rollout in answers:
                number = share[rollout.group]
                rollouts[number].append(replace(rollout, group=number))
        return [rollout for group in rollouts.values() for rollout in group]

    def close(self) -> None:
        """End the actors."""
        for worker in self.workers:
            self.ray.kill(worker)

    def _get(self, references: list[Any]) -> list[Any]:
        return _get(self.ray, references)


def share_prompts(prompts: Sequence[Prompt], workers: int) -> list[list[int]]:
    """Indices of the prompts of each worker, about as many each.

    A prompt that comes again goes where it went before: its answers are numbered on from those of the first time (see
    `first_samples`), and so they are in the share as in the whole call.
    """
    shares: list[list[int]] = [[] for _ in range(workers)]
    of_key: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        share = of_key.setdefault(prompt.key, min(shares, key=len))
        share.append(number)
    return shares


class RewardServerWorker:
    """In an actor: `mindrlhf serve-rm` as a process of the actor's machine."""

    def serve(self, model: str, token: str, options: Sequence[str]) -> str:
        """Starts it. Returns its address, which other machines can reach."""
        import ray

        command = [sys.executable, "-m", "mindrlhf", "serve-rm", "--model", model, "--port", "0"]
        command += ["--host", ray.util.get_node_ip_address(), *options]
        environment = {**os.environ, TOKEN_VARIABLE: token}
        self.server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        lines = []
        for line in self.server.stdout:
            if line.startswith("listening on "):
                return line.split()[-1]
            lines.append(line)
        message = lines[-1].removeprefix("mindrlhf: error: ") if lines else ""
        raise UserError(f"the reward server did not start, exit code {self.server.wait()}: {message}")

    def stop(self) -> None:
        """It answers what is queued first."""
        self.server.send_signal(signal.SIGTERM)
        self.server.communicate()


class RemoteRewardServer:
    """A reward model's server on a machine that Ray chooses; `url` is for `rewards: [{urls: [...]}]`.

    model: a reward model's directory on a disk that all machines share. options: more of `mindrlhf serve-rm`. The
    environment variable MINDRLHF_REWARD_TOKEN must be set, here and for the clients. Raises UserError.
    """

    def __init__(self, model: str, options: Sequence[str] = (), cpus: int = 1):
        self.ray = _import_ray()
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise UserError(f"{TOKEN_VARIABLE}: not set; other machines can reach the server, so it needs a token")
        self.worker = _actor(self.ray, RewardServerWorker, cpus)
        (self.url,) = _get(self.ray, [self.worker.serve.remote(model, token, list(options))])

    def close(self) -> None:
        """End the server and its actor."""
        _get(self.ray, [self.worker.stop.remote()])
        self.ray.kill(self.worker)


def _actor(ray: Any, cls: type, cpus: int) -> Any:
    return ray.remote(num_cpus=cpus, runtime_env={"env_vars": _ENVIRONMENT})(cls).remote()


def _import_ray() -> Any:
    prepare_environment()
    try:
        import ray
    except ImportError:
        raise UserError("Ray is not installed: pip install 'mindrlhf[ray]'") from None
    return ray


def _get(ray: Any, references: list[Any]) -> list[Any]:
    """A user's mistake in an actor is one here."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
