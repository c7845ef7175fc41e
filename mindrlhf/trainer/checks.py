"""What no single field of an online job's config shows."""

from mindrlhf.config import OnlineConfig
from mindrlhf.errors import UserError
from mindrlhf.trainer.loop import check_numbers
from mindrlhf.utils.parallel import world


def check_online(config: OnlineConfig, dynamic_sampling: bool) -> None:
    """dynamic_sampling: what the algorithm's row and the config come to. Raises UserError."""
    rollout, algorithm, trainer = config.rollout, config.algorithm, config.trainer
    pretraining, evaluation = config.pretraining, config.evaluation
    checks = (
        ("rollout.prompts_per_step", rollout.prompts_per_step, rollout.prompts_per_step > 0, "1 or more"),
        ("rollout.num_generations", rollout.num_generations, rollout.num_generations > 0, "1 or more"),
        ("rollout.slots", rollout.slots, rollout.slots > 0, "1 or more"),
        ("rollout.max_prompt_tokens", rollout.max_prompt_tokens, rollout.max_prompt_tokens > 0, "1 or more"),
        ("rollout.sampling.temperature", rollout.sampling.temperature, rollout.sampling.temperature > 0,
         "over 0: greedy answers have no distribution to train on"),
        ("rollout.sampling.repetition_penalty", rollout.sampling.repetition_penalty,
         rollout.sampling.repetition_penalty == 1, "1: training would not know of the penalty"),
        ("model.lora.dropout", config.model.lora.dropout, config.model.lora.dropout == 0,
         "0: the ratio would not be 1 on policy"),
        ("algorithm.learning_rate", algorithm.learning_rate, algorithm.learning_rate > 0, "over 0"),
        ("algorithm.epochs_per_rollout", algorithm.epochs_per_rollout, algorithm.epochs_per_rollout > 0, "1 or more"),
        ("algorithm.updates_per_epoch", algorithm.updates_per_epoch, algorithm.updates_per_epoch > 0, "1 or more"),
        ("rollout.max_turns", rollout.max_turns, rollout.max_turns > 0, "1 or more"),
        ("rollout.asynchronous", rollout.asynchronous, not rollout.asynchronous or world().size == 1,
         "false with several processes: their generation and training would exchange messages out of order"),
        ("rollout.partial_tokens", rollout.partial_tokens, rollout.partial_tokens >= 0, "0 (off) or more"),
        ("rollout.partial_tokens", rollout.partial_tokens, not (rollout.partial_tokens and rollout.environment),
         "0 with an environment: one in the middle of a conversation cannot be saved"),
        ("rollout.partial_tokens", rollout.partial_tokens, not (rollout.partial_tokens and dynamic_sampling),
         "0 with algorithm.dynamic_sampling: a group is not known to be informative before it is whole"),
        ("rollout.partial_tokens", rollout.partial_tokens, not (rollout.partial_tokens and algorithm.name == "remax"),
         "0 with remax: the greedy answers would be of newer weights than the others"),
        ("algorithm.gamma", algorithm.gamma, 0 < algorithm.gamma <= 1, "over 0 and at most 1"),
        ("algorithm.gae_lambda", algorithm.gae_lambda, 0 <= algorithm.gae_lambda <= 1, "between 0 and 1"),
        ("algorithm.ema_decay", algorithm.ema_decay, 0 <= algorithm.ema_decay < 1, "0 (off) or more and under 1"),
        ("algorithm.ema_decay", algorithm.ema_decay, not (algorithm.ema_decay and config.model.lora.rank),
         "0 with model.lora: the average is of whole weights"),
        ("algorithm.kl_target", algorithm.kl_target, algorithm.kl_target >= 0, "0 (off) or more"),
        ("algorithm.kl_horizon", algorithm.kl_horizon, algorithm.kl_horizon > 0, "over 0"),
        ("algorithm.missing_stop_penalty", algorithm.missing_stop_penalty, algorithm.missing_stop_penalty >= 0,
         "0 (off) or more: it is subtracted"),
        ("memory.swap", config.memory.swap, not (config.memory.swap and rollout.asynchronous),
         "false with rollout.asynchronous: generation and training need their models at the same time"),
        ("pretraining.coef", pretraining.coef, pretraining.coef >= 0, "0 (off) or more"),
        ("pretraining.batch_size", pretraining.batch_size, pretraining.batch_size > 0, "1 or more"),
        ("evaluation.num_generations", evaluation.num_generations, evaluation.num_generations > 0, "1 or more"),
        ("evaluation.k", evaluation.k, all(0 < k <= evaluation.num_generations for k in evaluation.k),
         "between 1 and evaluation.num_generations"),
        ("evaluation.temperature", evaluation.temperature, evaluation.temperature > 0, "over 0"),
        ("algorithm.dynamic_sampling_max_rounds", algorithm.dynamic_sampling_max_rounds,
         algorithm.dynamic_sampling_max_rounds > 0, "1 or more"),
        ("algorithm.reward_clip", algorithm.reward_clip, algorithm.reward_clip > 0, "over 0"),
        ("algorithm.advantage_epsilon", algorithm.advantage_epsilon, algorithm.advantage_epsilon >= 0, "0 or more"),
        ("algorithm.warmup_steps", algorithm.warmup_steps, algorithm.warmup_steps >= 0, "0 (none) or more"),
    )  # fmt: skip
    check_numbers(config, checks)
    window = rollout.max_prompt_tokens + rollout.sampling.max_tokens
    if trainer.row_tokens and trainer.row_tokens < window:
        raise UserError(
            f"trainer.row_tokens: {trainer.row_tokens} is under rollout.max_prompt_tokens + max_tokens, {window}"
        )
