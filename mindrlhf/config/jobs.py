"""What a command's YAML holds: a dataclass a job, made of sections."""

from dataclasses import dataclass, field

from mindrlhf.config.sections import (
    AlgorithmConfig,
    CriticConfig,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    KTOLossConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PreferenceLossConfig,
    PretrainingConfig,
    RewardFunctionConfig,
    RewardLossConfig,
    RolloutConfig,
    SamplingConfig,
    StepRewardConfig,
    TrainerConfig,
    TrainingConfig,
    WarmupConfig,
)


@dataclass
class OnlineConfig:
    """What every online job has."""

    seed: int = 1
    output: str = "runs/online"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: list[RewardFunctionConfig] = field(default_factory=lambda: [RewardFunctionConfig("accuracy")])
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def epochs(self) -> int:
        return self.trainer.epochs

    @property
    def num_generations(self) -> int:
        return self.rollout.num_generations

    @property
    def num_rollouts(self) -> int:
        """Answers a step."""
        return self.rollout.prompts_per_step * self.rollout.num_generations


@dataclass
class GRPOConfig(OnlineConfig):
    """Without a critic, `mindrlhf grpo`: any row of trainer/algorithms.py but ppo. Also what GRPOTrainer takes."""

    output: str = "runs/grpo"


@dataclass
class PPOConfig(OnlineConfig):
    """With a critic, `mindrlhf ppo`. Also what PPOTrainer takes."""

    output: str = "runs/ppo"
    algorithm: AlgorithmConfig = field(default_factory=lambda: AlgorithmConfig(name="ppo"))
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass
class OfflineConfig:
    """What every job on a fixed data set has."""

    seed: int = 1
    output: str = "runs/offline"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(strict=False))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning: `mindrlhf sft`."""

    output: str = "runs/sft"


@dataclass
class RewardConfig(OfflineConfig):
    """A reward model: `mindrlhf rm`."""

    output: str = "runs/rm"
    loss: RewardLossConfig = field(default_factory=RewardLossConfig)


@dataclass
class DPOConfig(OfflineConfig):
    """The DPO family: `mindrlhf dpo`."""

    output: str = "runs/dpo"
    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)


@dataclass
class KTOConfig(OfflineConfig):
    """KTO: `mindrlhf kto`."""

    output: str = "runs/kto"
    loss: KTOLossConfig = field(default_factory=KTOLossConfig)


@dataclass
class PRMConfig(OfflineConfig):
    """A process reward model: `mindrlhf prm`."""

    output: str = "runs/prm"
    steps: StepRewardConfig = field(default_factory=StepRewardConfig)


@dataclass
class KDConfig(OfflineConfig):
    """Distillation: `mindrlhf kd`."""

    output: str = "runs/kd"
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # of the on-policy answers


@dataclass
class InferenceConfig:
    """What `mindrlhf generate` and `mindrlhf eval` do with a checkpoint."""

    seed: int = 1
    num_generations: int = 1  # answers a prompt
    slots: int = 32  # answers decoded at the same time
    max_prompt_tokens: int = 512
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: list[RewardFunctionConfig] = field(default_factory=lambda: [RewardFunctionConfig("accuracy")])
