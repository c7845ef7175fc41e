"""The sections of a job's configuration. Every field says its meaning and unit beside it."""

import typing
from dataclasses import dataclass, field
from typing import Any, Literal

# Read from a YAML they are relative to its directory, from an override to the current one; made absolute on reading.
PathText = typing.NewType("PathText", str)
FunctionText = typing.NewType("FunctionText", str)  # a name, or path.py:function


@dataclass
class BuildConfig:
    """A model made from nothing, for when there is no checkpoint: random weights and a trained tokenizer."""

    decoder: dict[str, Any] = field(default_factory=dict)  # keys of a Hugging Face config.json, model_type included
    vocab_size: int = 320  # of the byte-level BPE trained on tokenizer_files; at least 260
    tokenizer_files: list[PathText] = field(default_factory=list)  # any text
    chat_template: str = ""  # jinja; empty: none


@dataclass
class LoraConfig:
    """Low-rank adapters, arXiv 2106.09685, in PEFT's terms: W + alpha / rank B A; everything else is frozen."""

    rank: int = 0  # 0: off
    alpha: float = 16.0
    dropout: float = 0.0  # share of an adapter's inputs that a training step leaves out
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])  # projections, or [all-linear]
    layers: list[int] = field(default_factory=list)  # numbers of the adapted layers, from 0; empty: all


@dataclass
class BalanceConfig:
    """How training keeps the load of experts even: by a loss (arXiv 2101.03961), and by the biases of DeepSeek-V3's
    routers (arXiv 2408.15664)."""

    auxiliary_coef: float | None = None  # weight of the loss; null: router_aux_loss_coef of the model's config.json
    bias_rate: float = 0.0  # by which an optimizer step moves the bias of each expert; 0.001 is usual; 0: off


@dataclass
class ModelConfig:
    path: PathText = ""  # a Hugging Face checkpoint directory, or one with a PEFT adapter; empty: build
    build: BuildConfig = field(default_factory=BuildConfig)
    tokenizer: PathText = ""  # a tokenizer directory; empty: the checkpoint's own
    add_tokens: list[str] = field(default_factory=list)  # special tokens for the tokenizer, with rows in the embedding
    backbone: Literal["decoder", "mindformers"] = "decoder"  # whose cells are trained: this suite's or MindFormers'
    mindformers: PathText = ""  # a MindFormers YAML, which describes the model instead of build.decoder
    reference: PathText = ""  # checkpoint of the reference policy; empty: the policy as training starts
    train_layers: list[int] = field(default_factory=list)  # train only these layers and the score head; empty: all
    lora: LoraConfig = field(default_factory=LoraConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of matrix products; all else is float32
    recompute: bool = False  # layers once more in the backward pass, instead of keeping what is inside of them
    logits_at_once: int = 33554432  # of the head and the loss, tokens x vocabulary; 0: all of a micro-batch


@dataclass
class SourceConfig:
    """One data set file."""

    path: PathText = ""  # .json, .jsonl, .csv or .parquet
    probability: float = 1.0  # share of this file among the training sources, normalised to 1


@dataclass
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)
    test: list[SourceConfig] = field(default_factory=list)  # held out; never trained on
    format: Literal["prompt", "alpaca", "messages", "text"] = "prompt"  # of supervised rows, see docs/data.md
    prompt_key: str = "prompt"  # column with a string or a list of chat messages
    label_key: str = "label"  # column with the reference answer, KTO's or PRM's label; empty: none
    response_key: str = "response"  # column with the answer to imitate (supervised training) or to judge
    messages_key: str = "messages"  # column with whole conversations (format messages)
    text_key: str = "text"  # column with text of which every token is trained (format text)
    chosen_key: str = "chosen"  # column with the better answer: text, or messages
    rejected_key: str = "rejected"  # column with the worse one
    margin_key: str = ""  # column with a number by how much it is better; empty: 0
    steps_key: str = "input"  # column with a solution that has a placeholder behind each step (PRM)
    apply_chat_template: bool = False  # the tokenizer's jinja template; a string becomes one user message
    system_prompt: str = ""  # put before every conversation when the chat template is used
    input_template: str = "{}"  # otherwise: "{}" is where the prompt goes
    max_rows: int = 0  # first rows of each file only; 0: all
    strict: bool = True  # False, the default of offline jobs: unusable rows are skipped and counted


@dataclass
class WarmupConfig:
    """Supervised training before the online stage."""

    steps: int = 0  # optimizer steps; 0: no warm-up
    train: list[SourceConfig] = field(default_factory=list)  # of prompt_key and response_key
    batch_size: int = 64  # conversations an optimizer step
    learning_rate: float = 1e-3
    warmup_steps: int = 0  # linear rise of the learning rate


@dataclass
class SamplingConfig:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen
    max_tokens: int = 256  # of one answer
    stop: list[str] = field(default_factory=list)  # token strings that end an answer besides the tokenizer's own


@dataclass
class ParallelConfig:
    """How the processes share a model; their number is data x tensor x sequence. One process: as it stands."""

    data: int = 0  # replicas, each with micro-batches, or prompts, of its own; 0: what the others leave of the world
    tensor: int = 1  # processes that split every matrix; divides the attention heads and the vocabulary
    expert: int = 1  # of the tensor processes, over how many whole experts are spread; the rest split each expert
    sequence: int = 1  # processes that split the tokens of every row; training only
    zero: bool = False  # optimizer states split over the replicas (ZeRO-1); training only


@dataclass
class RolloutConfig:
    prompts_per_step: int = 32
    num_generations: int = 8  # answers a prompt: the group
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    slots: int = 64  # answers decoded at the same time, by each replica
    max_prompt_tokens: int = 512  # the window: a longer prompt is an error, see data.strict
    # How generation splits the model, apart from training; tensor and expert 0: as in training.
    parallel: ParallelConfig = field(default_factory=lambda: ParallelConfig(tensor=0, expert=0))
    check_sync: bool = False  # compare checksums of the weights on both sides after every change of layout
    environment: FunctionText = ""  # path.py:Class of a multi-turn environment, see docs/agents.md; empty: one turn
    max_turns: int = 8  # of one conversation with an environment
    partial_tokens: int = 0  # sampled tokens an answer and step; what is unfinished goes on in the next; 0: off
    asynchronous: bool = False  # generate the next step's answers while this step trains: one step off-policy


@dataclass
class StepRewardConfig:
    """How the steps of a solution are judged."""

    placeholder: str = "<|step|>"  # the token behind each step, at which the judgement is read; exactly one token
    reward_tokens: list[str] = field(default_factory=lambda: ["+", "-"])  # best first; one token each


@dataclass
class RewardFunctionConfig:
    """One part of the reward: a function, a model's directory (`model`), or servers (`urls`); exactly one of them."""

    function: FunctionText = ""  # a name of docs/rewards.md, or path.py:function
    weight: float = 1.0
    name: str = ""  # in the metrics; empty: the function's name, `model` or `remote`
    arguments: dict[str, Any] = field(default_factory=dict)  # of the function, by keyword
    model: PathText = ""  # directory of a reward model, or of a process reward model, instead of a function
    normalize_reward: bool = False  # model: (score - mean) / std of its evaluation set
    process: bool = False  # model: it is a process reward model, which judges every step
    step_separator: str = "\n"  # process: what ends a step of an answer
    step_reduction: Literal["min", "mean", "product", "last"] = "min"  # process: from its steps to the answer's reward
    steps: StepRewardConfig = field(default_factory=StepRewardConfig)  # process: its tokens
    urls: list[str] = field(default_factory=list)  # servers of one reward model, which share the load
    timeout: float = 180.0  # urls: seconds that a request may take
    retries: int = 5  # urls: after the first attempt, with growing pauses, each at the next server


@dataclass
class MismatchConfig:
    """What generation's log-probs and training's old log-probs differ by: w = exp(old - sampled)."""

    rescore: bool = False  # take the old log-probs from a forward pass before training, not from generation
    # auto: truncated where answers are of older weights (rollout.asynchronous, partial_tokens), else none
    correction: Literal["auto", "none", "truncated", "icepop", "sequence_mask"] = "auto"  # of the advantages; rescores
    low: float = 0.5  # of w: truncated clamps to [low, high], icepop takes 0 outside of it
    high: float = 5.0  # and sequence_mask leaves out answers whose geometric mean of w is outside


@dataclass
class AlgorithmConfig:
    """What is None takes the default of the algorithm's row in mindrlhf/trainer/algorithms.py."""

    name: str = "grpo"  # a row of the table
    learning_rate: float = 1e-6  # peak
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0  # linear rise of the learning rate from 0
    min_learning_rate_ratio: float = 0.0  # linear and cosine end at this times the peak
    policy_loss: str | None = None  # ppo, gspo, cispo, reinforce or importance_sampling
    aggregation: str | None = None  # token_mean, sequence_mean, sequence_sum, constant or token_sum
    advantage_epsilon: float = 1e-6  # added to the group's standard deviation
    whiten: bool | None = None  # advantages of the whole step to mean 0 and deviation 1, over its tokens
    whiten_ddof: Literal[0, 1] = 0  # 1: with the variance of a sample
    gamma: float = 1.0  # discount of rewards, per sampled token
    gae_lambda: float = 1.0  # 1: whole returns; under 1 the critic's values stand in for the rest (PPO)
    eps_low: float | None = None  # clip range of the ratio below 1
    eps_high: float | None = None  # clip range above 1
    dual_clip: float | None = None  # bound of the loss where the advantage is negative, over 1; 0: off
    kl_coef: float | None = None  # weight of the KL to the reference
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_in_reward: bool | None = None  # True: subtracted from the reward; False: added to the loss
    kl_target: float = 0.0  # nats an answer that the adaptive controller steers kl_coef to; 0: kl_coef is fixed
    kl_horizon: float = 10000.0  # answers over which the controller acts
    entropy_coef: float = 0.0  # bonus for entropy
    reward_clip: float = 10.0  # rewards are clipped to [-reward_clip, reward_clip] before any baseline
    missing_stop_penalty: float = 0.0  # subtracted from the reward of an answer that was cut off
    epochs_per_rollout: int = 1  # passes over each batch of answers
    updates_per_epoch: int = 1  # optimizer steps that a pass is split into
    dynamic_sampling: bool | None = None  # resample until no group is all right or all wrong
    dynamic_sampling_max_rounds: int = 4  # generation rounds a step before it trains on what it has
    overlong_buffer: int | None = None  # last tokens of max_tokens, where the length penalty rises to factor; 0: off
    overlong_factor: float = 1.0
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    ema_decay: float = 0.0  # of a running average of the weights, saved beside them and evaluated; 0: off


@dataclass
class PretrainingConfig:
    """PPO-ptx, arXiv 2203.02155: a supervised loss mixed into every policy update."""

    coef: float = 0.0  # weight of its loss; 0: off
    train: list[SourceConfig] = field(default_factory=list)  # rows as `mindrlhf sft` reads them
    batch_size: int = 32  # rows an update


@dataclass
class CriticConfig:
    """The value function of PPO."""

    model: PathText = ""  # a checkpoint to begin with, a reward model's for example; empty: the policy as it starts
    shared_trunk: bool = False  # a value head on the policy's own decoder, trained with it in one graph
    learning_rate: float = 1e-5  # peak, with the policy's schedule; a shared trunk has the policy's
    coef: float = 0.1  # weight of the value loss in the policy's, with a shared trunk
    value_clip: float = 0.5  # values move at most so far from the old ones without loss; 0: off
    warmup_steps: int = 0  # first steps that train the critic alone


@dataclass
class TrainingConfig:
    """The optimizer steps of an offline stage."""

    batch_size: int = 32  # rows of the data set an optimizer step
    learning_rate: float = 1e-5  # peak
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0  # linear rise of the learning rate from 0
    min_learning_rate_ratio: float = 0.1  # linear and cosine end at this times the peak
    max_tokens: int = 0  # of one sequence, prompt and answer; 0: the model's window


@dataclass
class RewardLossConfig:
    kind: Literal["sigmoid", "log_exp"] = "sigmoid"  # -log sigmoid(d), or log(1 + exp(-d)): the same value
    centering_coef: float = 0.0  # weight of (chosen + rejected)^2, which keeps the scores around 0


@dataclass
class PreferenceLossConfig:
    name: str = "dpo"  # a row of the table in docs/algorithms.md
    beta: float = 0.1  # how strongly the policy is held to the reference
    label_smoothing: float = 0.0  # cdpo and robust: the share of pairs that are taken for swapped
    gamma: float = 0.5  # simpo: the margin by which the chosen answer must win
    nll_coef: float = 0.0  # weight of the chosen answers' negative log-likelihood
    reference: Literal["cached", "live", "adapter_off"] = "cached"  # once; each step; each step, LoRA switched off


@dataclass
class KTOLossConfig:
    name: Literal["kto", "kto_pair"] = "kto"  # unpaired rows; or chosen and rejected of each prompt
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Literal["cached", "live", "adapter_off"] = "cached"  # as in DPO


@dataclass
class DistillationConfig:
    teacher: PathText = ""  # checkpoint of the teacher, which must have the student's vocabulary
    name: Literal["kd", "gkd"] = "kd"  # (1 - coef) CE + coef CE to the teacher; or GKD's divergence alone
    coef: float = 0.4  # kd: weight of the teacher against the data
    beta: float = 0.5  # gkd: 0 forward KL, 1 reverse KL, between them the divergence from the mixture
    temperature: float = 1.0  # of both distributions
    on_policy: float = 0.0  # share of the steps whose answers the student samples itself


@dataclass
class MemoryConfig:
    """What a phase does not need is put away while it runs."""

    swap: bool = False  # models and optimizer states leave the device's memory (on a CPU: the process's) between uses
    directory: PathText = ""  # where the files of swap lie, on a CPU; empty: the system's temporary directory
    prefetch: bool = True  # begin to bring the next phase's roles back while the current one still runs


@dataclass
class OptimizerConfig:
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices only: never on norms and biases
    max_grad_norm: float = 1.0  # global norm; 0: off


@dataclass
class TrainerConfig:
    steps: int = 0  # 0: epochs passes over the data
    epochs: int = 1  # passes over the data where steps is 0
    rows: int = 16  # packed rows a micro-batch
    row_tokens: int = 0  # tokens a packed row; 0: what the longest sequence can need
    evaluate_every: int = 0  # steps; 0: before and after only
    evaluate_rows: int = 0  # first held-out rows; 0: all
    save_every: int = 0  # steps; 0: at the end only
    keep_checkpoints: int = 2  # older ones are removed; 0: keep all
    best: str = ""  # a metric of the evaluations, whose best checkpoint is kept; empty: none
    best_is: Literal["largest", "smallest"] = "largest"
    patience: int = 0  # evaluations without a better `best` before the run stops; 0: off
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest whole checkpoint of the output directory


@dataclass
class EvaluationConfig:
    """Held-out answers during online training: greedy ones, and where num_generations is over 1 sampled ones."""

    num_generations: int = 1  # sampled answers a problem, for pass@k and maj@k
    k: list[int] = field(default_factory=lambda: [1])  # of pass@k and maj@k, up to num_generations
    temperature: float = 1.0  # of the sampled answers, whatever that of the rollouts is
    kl: bool = False  # KL to the reference of answers sampled as in training, and their reward less the KL penalty


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb: bool = False  # needs `pip install wandb`
    swanlab: bool = False  # needs `pip install swanlab`
    project: str = "mindrlhf"  # for wandb and swanlab
    completions_every: int = 10  # steps between dumps of sampled answers; 0: off
    progress: bool = True  # the bar in the terminal
