"""Small whole runs, one after the other, as ranks of one world:

    parallel_job.py DIRECTORY CASE [CASE ...]

CASE is NAME:KIND:key=value;key=value... and runs into DIRECTORY/NAME. KIND is of ONLINE_KINDS or of stages.STAGES; kd
needs a run named teacher, of two steps, before it. The data lies in DIRECTORY (`write_data`). A name that came before
goes on with that run.
"""

import json
import sys
from pathlib import Path

from mindrlhf.utils.parallel import prepare_environment
from tests.trainer import stages

DECODER = {**stages.DECODER, "num_key_value_heads": 4}
UNTIED = {**DECODER, "tie_word_embeddings": False}
DECODERS = {  # of kinds that have one of their own
    "mixtral": {**UNTIED, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {**UNTIED, "model_type": "qwen3", "head_dim": 16},
    "glm4": {**UNTIED, "model_type": "glm4", "head_dim": 8},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_inner": 48, "n_layer": 1, "n_head": 4, "n_positions": 64,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    },
    "deepseek_v3": {
        **UNTIED, "model_type": "deepseek_v3", "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
COMMON = {"model.build.vocab_size": 272, "trainer.rows": 2, "trainer.steps": 20, "logging.tensorboard": "false"}
ONLINE = {
    "rollout.prompts_per_step": 4, "rollout.num_generations": 4, "rollout.slots": 8, "rollout.max_prompt_tokens": 8,
    "rollout.sampling.max_tokens": 7, "algorithm.kl_coef": 0.01, "algorithm.learning_rate": 1e-3,
    "rollout.check_sync": "true",
}  # fmt: skip
OFFLINE = {"training.batch_size": 8, "training.learning_rate": 1e-3}
BALANCE = {"deepseek_v3": ["model.balance.auxiliary_coef=0.1", "model.balance.bias_rate=0.01"]}

ONLINE_KINDS = {  # as stages.STAGES
    "grpo": ("GRPOConfig", "GRPOTrainer", []),
    **{f"grpo_{family}": ("GRPOConfig", "GRPOTrainer", BALANCE.get(family, [])) for family in DECODERS},
    "ppo": ("PPOConfig", "PPOTrainer", []),
}


def write_data(directory: Path) -> None:
    stages.write_rows(directory / "rows.jsonl")
    rows = [{"prompt": f"{a}+{a + 1}=", "label": str(2 * a + 1), "response": str(2 * a + 1)} for a in range(6)]
    (directory / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def letter_reward(completions, **columns):
    """The share of even characters, so that every group has a signal."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in completions]


def trainer_of(directory: Path, name: str, kind: str, overrides: list[str]):
    import mindrlhf
    import mindrlhf.config as configurations

    online = kind in ONLINE_KINDS
    config_class, trainer, more = ONLINE_KINDS[kind] if online else stages.STAGES[kind]
    data = directory / ("problems.jsonl" if online else "rows.jsonl")
    values = {
        "output": directory / name,
        "model.build.decoder": json.dumps(DECODERS.get(kind.removeprefix("grpo_"), DECODER)),
        "model.build.tokenizer_files": f"[{directory / 'rows.jsonl'}]",
        "data.train": f"[{{path: {data}}}]",
        "data.test": f"[{{path: {data}}}]",
        **COMMON,
        **(ONLINE if online else OFFLINE),
    }
    given = [f"{key}={value}" for key, value in values.items()] + [*more, *overrides]
    given = [one.replace("TEACHER", str(directory / "teacher/checkpoints/step-000002")) for one in given]
    config = configurations.load_config(getattr(configurations, config_class), None, given)
    make = getattr(mindrlhf, trainer)
    return make(config, reward_funcs=letter_reward) if online else make(config)


def main(directory: str, *cases: str) -> None:
    from mindrlhf.utils.parallel import gather_objects

    for case in cases:
        name, kind, overrides = case.split(":", 2)
        trainer_of(Path(directory), name, kind, [one for one in overrides.split(";") if one]).fit()
    gather_objects(None)  # rank 0 holds the store: it leaves last


if __name__ == "__main__":
    prepare_environment()
    main(*sys.argv[1:])
