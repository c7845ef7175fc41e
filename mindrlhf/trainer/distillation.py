"""Distillation of a teacher into a student."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from mindspore import nn

from mindrlhf.config import KDConfig
from mindrlhf.errors import UserError
from mindrlhf.models.decoder import Decoder
from mindrlhf.trainer.layouts import scoring_layout
from mindrlhf.trainer.offline import TEST, TRAIN
from mindrlhf.trainer.roles import open_checkpoint
from mindrlhf.trainer.supervised import SFTTrainer
from mindrlhf.types import Conversation, Prompt
from mindrlhf.wrapper.generator import Generator
from mindrlhf.wrapper.objectives import DistillationObjective
from mindrlhf.wrapper.sampling import check_sampling, mix


class KDTrainer(SFTTrainer):
    """Learns the data's answers and a teacher's distribution over them.

    KDTrainer(load_config(KDConfig, "job.yaml")).fit()

    distillation.name kd: (1 - coef) CE + coef KD (Hinton et al. 2015, arXiv 1503.02531); gkd: the generalised
    divergence (arXiv 2306.13649). In a share distillation.on_policy of the steps the student answers the prompts itself
    and the divergence is taken on its own answers.
    """

    config: KDConfig

    def make_objective(self) -> nn.Cell:
        settings, student = self.config.distillation, self.policy
        if not settings.teacher:
            raise UserError("distillation.teacher: no checkpoint is named; set it to the teacher's directory")
        for name in ("on_policy", "coef", "beta"):
            if not 0 <= getattr(settings, name) <= 1:
                raise UserError(f"distillation.{name}: {getattr(settings, name)} is not a share; use 0 to 1")
        if settings.temperature <= 0:
            raise UserError(f"distillation.temperature: {settings.temperature} must be over 0")
        if settings.on_policy and settings.name == "kd" and settings.coef < 1:
            raise UserError(
                "distillation.on_policy: kd would also imitate the student's own answers; set distillation.coef=1 or "
                "distillation.name=gkd"
            )
        if settings.on_policy:
            self._check_sampling()
        make = student.decoder.config.compute.applied_to(Decoder)
        teacher = open_checkpoint(settings.teacher, head="logits", layout=student.decoder.layout, make=make)
        if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise UserError(
                f"distillation.teacher: {settings.teacher} has another vocabulary than the student; take a teacher "
                "whose tokenizer is the student's"
            )
        ours, theirs = student.decoder.config.vocab_size, teacher.decoder.config.vocab_size
        if ours != theirs:
            raise UserError(f"distillation.teacher: has {theirs} logits, the student {ours}; both must be one")
        if teacher.decoder.config.max_positions < self.longest:
            theirs = teacher.decoder.config.max_positions
            raise UserError(f"distillation.teacher: has {theirs} positions, {self.longest} are needed; take another")
        return DistillationObjective(student.decoder, teacher.decoder, settings)

    def batches(self, split: str, numbers: Sequence[int]) -> list[tuple]:
        share = self.config.distillation.on_policy
        if split == TEST or np.random.default_rng((self.config.seed, self.step)).random() >= share:
            return super().batches(split, numbers)
        return self.supervised_batches(self._answered(numbers))

    def _check_sampling(self) -> None:
        """Before the first step: an on-policy one may come late. Raises UserError."""
        check_sampling(self.config.sampling)
        if self.longest > self.policy.decoder.config.max_positions:
            raise UserError(
                f"sampling.max_tokens: {self.config.sampling.max_tokens}, with the longest prompt of "
                f"{self._longest_prompt} tokens, is more than the model's window of "
                f"{self.policy.decoder.config.max_positions}; lower it"
            )

    def _answered(self, numbers: Sequence[int]) -> list[Conversation]:
        """The prompts of those conversations with answers that today's student samples."""
        examples = self.examples[TRAIN].items
        prompts = [Prompt(_prompt(examples[number]), "", None, number) for number in numbers]
        self._generator.sync()
        seed = int(mix(self.config.seed, self.step))
        rollouts = self._generator.generate(prompts, 1, self.config.sampling, seed)
        self._generator.release()  # training needs the memory
        answered = []
        for rollout in rollouts:
            ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
            answered.append(Conversation(ids, np.arange(len(ids)) >= len(rollout.prompt_ids)))
        return answered

    @cached_property
    def _generator(self) -> Generator:
        stop = self.policy.stop_ids(self.config.sampling.stop)
        slots = min(self.config.training.batch_size, 64)  # they are refilled
        decoder, longest = self.policy.decoder, self.config.sampling.max_tokens
        layout = scoring_layout(decoder.layout)
        return Generator(decoder, slots, self._longest_prompt, longest, stop, layout=layout)

    @cached_property
    def _longest_prompt(self) -> int:
        return max(len(_prompt(example)) for example in self.examples[TRAIN].items)

    @cached_property
    def longest(self) -> int:
        """An answer of the student may be longer than the data's."""
        sampled = self._longest_prompt + self.config.sampling.max_tokens if self.config.distillation.on_policy else 0
        return max(super().longest, sampled)


def _prompt(conversation: Conversation) -> np.ndarray:
    """What stands before the first trained token, [P] int32."""
    return conversation.ids[: int(np.argmax(conversation.trained))]
