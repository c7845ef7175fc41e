"""The published GRPO program, its model configurations, and their errors."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mindrlhf.config import GRPOConfig, SourceConfig
from mindrlhf.data.tokenizers import build_tokenizer
from mindrlhf.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "programs" / "grpo_published.py"
PUBLISHED = """
grpo_config = GRPOConfig()
sft_model_config_infer = LlamaConfig(**sft_config_infer.model.model_config)
sft_model_config_train = LlamaConfig(**sft_config_train.model.model_config)
ref_model_config = LlamaConfig(**ref_config.model.model_config)
tokenizer = Qwen2Tokenizer(args.vocab_path, args.merges_file_path, add_bos_token=False, add_eos_token=False)
trainer = GRPOTrainer(grpo_config=grpo_config, sft_model_config_infer=sft_model_config_infer,
                      sft_model_config_train=sft_model_config_train, ref_model_config=ref_model_config,
                      reward_funcs=[accuracy_reward, format_reward], tokenizer=tokenizer)
grpo_with_grad = init_grpo_network_and_optimizer(trainer)
for n in range(grpo_config.epochs):
    steps = trainer.prompt_dataset.get_dataset_size() // trainer.prompt_dataset.get_batch_size()
    for i in range(steps):
        trainer.make_experience(num_generations=grpo_config.num_generations, rank_id=rank_id)
        dataset = init_grpo_dataset(trainer)
        trainer.train(grpo_with_grad, dataset)
"""


@pytest.fixture(scope="module")
def tokenizer_files(problems, tmp_path_factory):
    """Directory with vocab.json and merges.txt."""
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer([problems], 272, directory)
    return directory


@pytest.fixture()
def published(mindspore, problems, tokenizer_files, tmp_path):
    """A function: changes of one of the arguments of the published GRPOTrainer(...) -> the trainer."""
    from mindrlhf import GRPOTrainer, Qwen2Tokenizer, accuracy_reward, format_reward

    config = GRPOConfig(output=str(tmp_path / "run"))
    config.data.train = [SourceConfig(path=str(problems))]
    config.rollout.max_prompt_tokens = config.rollout.sampling.max_tokens = 8

    def make(**changes):
        arguments = dict(
            grpo_config=config,
            sft_model_config_infer=llama_config(),
            sft_model_config_train=llama_config(),
            ref_model_config=llama_config(),
            reward_funcs=[accuracy_reward, format_reward],
            tokenizer=Qwen2Tokenizer(tokenizer_files / "vocab.json", tokenizer_files / "merges.txt"),
        )
        return GRPOTrainer(**{**arguments, **changes})

    return make


def llama_config(**changes):
    """The attributes of mindformers.LlamaConfig that are read; importing MindFormers takes seconds."""
    values = dict(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, n_kv_heads=2, multiple_of=16,
        ffn_dim_multiplier=None, rms_norm_eps=1e-6, qkv_has_bias=True, attn_proj_has_bias=False, theta=10000.0,
        seq_length=32, max_position_embedding=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        init_method_std=0.02, extend_method="None", scaling_factor=1.0, checkpoint_name_or_path="",
    )  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def test_the_program_has_the_published_lines_in_order():
    lines = iter(PROGRAM.read_text(encoding="utf-8").splitlines())
    for line in PUBLISHED.strip().splitlines():
        assert any(found.partition("  # ")[0] == line for found in lines), line


def test_the_published_program_runs(problems, tokenizer_files, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, str(PROGRAM), "--data", str(problems), "--output", str(output)]
    command += ["--vocab_path", str(tokenizer_files / "vocab.json")]
    command += ["--merges_file_path", str(tokenizer_files / "merges.txt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((output / "report.json").read_text())
    assert len(report["history"]) == 2 * 3  # two epochs of six problems, two a step
    assert all(math.isfinite(value) for metrics in report["history"] for value in metrics.values())
    for metrics in report["history"]:
        assert metrics["answers"] == 8 and "kl" in metrics and "reward/format_reward" in metrics
        assert metrics["mismatch_max"] < 1e-4
    assert all(moved > 1e-3 for moved in report["moved"].values())
    assert report["history"][0]["kl"] == 0 < report["history"][-1]["kl"]
    assert (Path(report["checkpoint"]) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft_model_config_infer": llama_config(hidden_size=64)},
         "sft_model_config_infer: hidden_size is 64, but 32 in sft_model_config_train"),
        ({"sft_model_config_infer": llama_config(theta=1e6)}, "sft_model_config_infer: rope_theta is 1000000.0, but"),
        ({"ref_model_config": llama_config(num_layers=2)}, "ref_model_config: num_layers is 2, but 1"),
        ({"tokenizer": None}, "tokenizer is needed"),
        ({"sft_model_config_train": None}, "sft_model_config_train is needed beside sft_model_config_infer"),
        ({"sft_model_config_train": llama_config(vocab_size=100)}, "sft_model_config_infer: vocab_size is 272"),
        ({"sft_model_config_train": llama_config(checkpoint_name_or_path="/nowhere")}, "/nowhere: neither"),
        ({"reward_funcs": [3]}, "int, not a function"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line(published, changes, message):
    with pytest.raises(UserError) as error:
        published(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_model_is_refused(published):
    small = {
        name: llama_config(vocab_size=100)
        for name in ("sft_model_config_infer", "sft_model_config_train", "ref_model_config")
    }
    with pytest.raises(UserError, match=r"the tokenizer has token 2\d\d, but the model's vocab_size is 100"):
        published(**small)


def test_end_tokens_are_special_tokens_only(published):
    """LlamaConfig's own default is 2, a letter of Qwen2's vocabulary."""
    trainer = published()
    end = trainer.policy.tokenizer.eos_token_id
    assert trainer.policy.generation_config == {"eos_token_id": [end]}
    with_end_of_turn = llama_config(eos_token_id=[end + 2, end])
    trainer = published(sft_model_config_train=with_end_of_turn)
    assert trainer.policy.generation_config == {"eos_token_id": [end, end + 2]}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2_5_0_5b", 494_032_768), ("qwen2_5_1_5b", 1_543_714_304), ("qwen2_5_7b", 7_615_616_512)],
)
def test_shipped_model_configs(mindspore, name, parameters):
    """Sizes as Qwen publishes them, through MindFormers' own reader."""
    from mindformers import LlamaConfig, MindFormerConfig

    from mindrlhf.models.mindformers_config import decoder_config

    mode = mindspore.get_context("mode")
    content = MindFormerConfig(str(ROOT / "model_configs" / f"{name}.yaml"))
    config = decoder_config(LlamaConfig(**content.model.model_config))
    assert config.num_parameters == parameters
    assert (config.model_type, config.qkv_bias, config.output_bias) == ("qwen2", True, False)
    assert (config.rope_theta, config.norm_epsilon, config.max_positions) == (1e6, 1e-6, 32768)
    assert config.eos_token_ids == (151645, 151643)
    assert mindspore.get_context("mode") == mode
