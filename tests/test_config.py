"""mindrlhf/config.py: strict YAML, and one line for each mistake that says where it is."""

import math

import pytest

from mindrlhf.config import GRPOConfig, RewardFunctionConfig, config_to_yaml, load_config
from mindrlhf.errors import UserError


@pytest.fixture
def load(tmp_path):
    """Write the text as job.yaml and load it; the file's own path is cut off error messages."""

    def write_and_load(text, *overrides):
        path = tmp_path / "job.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(GRPOConfig, path, overrides)

    return write_and_load


def message_of(error, tmp_path):
    text = str(error.value)
    assert "\n" not in text
    return text.replace(f"{tmp_path}/", "")


def test_empty_file_is_all_defaults(load):
    assert load("") == GRPOConfig()
    assert load("# nothing but a comment\n") == GRPOConfig()


def test_round_trip(load):
    config = load(
        "seed: 7\n"
        "model: {path: some/modèle, build: {decoder: {model_type: qwen2, rope_theta: 1e6}}}\n"
        "data: {train: [{path: a.jsonl, probability: 0.25}, {path: b.csv}]}\n"
        "rewards: [{function: accuracy}, {function: format, weight: 1e-1}]\n"
        "algorithm: {name: dapo, eps_high: 0.28, learning_rate: 1e-5, kl_coef: null}\n"
        "rollout: {sampling: {stop: ['</s>']}}\n"
    )
    text = config_to_yaml(config)
    again = load(text)
    assert again == config
    assert config_to_yaml(again) == text
    assert config.data.train[1].probability == 1.0
    assert config.model.build.decoder["rope_theta"] == 1e6


def test_values_of_every_kind(load):
    config = load(
        "output: runs/x\n"
        "data: {strict: false}\n"
        "algorithm: {learning_rate: 1e-5, eps_low: 1, overlong_buffer: 8}\n"
        "optimizer: {epsilon: 1.0E-6, max_grad_norm: .inf}\n"
    )
    assert config.output == "runs/x"
    assert config.data.strict is False
    assert config.algorithm.learning_rate == 1e-5
    assert isinstance(config.algorithm.eps_low, float)
    assert config.algorithm.overlong_buffer == 8
    assert config.algorithm.eps_high is None
    assert config.optimizer.epsilon == 1e-6
    assert math.isinf(config.optimizer.max_grad_norm)


def test_defaults_are_not_shared(load):
    first, second = load(""), load("")
    first.rewards.append(first.rewards[0])
    first.model.build.decoder["hidden_size"] = 8
    assert second == GRPOConfig()


def test_paths_are_relative_to_the_yaml(load, tmp_path):
    config = load(
        "model: {path: models/a, build: {tokenizer_files: [t.txt]}}\n"
        "data: {train: [{path: ../a.jsonl}], test: [{path: /data/b.csv}]}\n"
        "rewards: [{function: format}, {function: 'mine.py:score'}]\n"
    )
    assert config.model.path == str(tmp_path / "models/a")
    assert config.model.build.tokenizer_files == [str(tmp_path / "t.txt")]
    assert config.data.train[0].path == str(tmp_path.parent / "a.jsonl")
    assert config.data.test[0].path == "/data/b.csv"
    assert [reward.function for reward in config.rewards] == ["format", str(tmp_path / "mine.py:score")]
    assert config.model.tokenizer == ""  # not set is not a path


def test_paths_of_overrides_are_relative_to_the_current_directory(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load("model: {path: a}\n", "model.path=b").model.path == str(tmp_path / "elsewhere" / "b")


def test_paths_deep_in_overrides_too(load, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load("", "data.train=[{path: x.csv}]")
    assert config.data.train[0].path == str(tmp_path / "elsewhere" / "x.csv")


def test_without_a_file():
    assert load_config(GRPOConfig, None, ["seed=3"]) == GRPOConfig(seed=3)


MISTAKES = {
    "unknown key": (
        "seed: 1\nalgorithm:\n  learning_rat: 1e-5\n",
        "job.yaml:3: unknown key 'algorithm.learning_rat'; did you mean 'learning_rate'?",
    ),
    "unknown key, nothing near": (
        "model:\n  lora:\n    zzz: 1\n",
        "job.yaml:3: unknown key 'model.lora.zzz'; known keys: rank, alpha, dropout, target_modules, layers",
    ),
    "unknown key in a list": (
        "rewards:\n  - function: accuracy\n  - functoin: format\n",
        "job.yaml:3: unknown key 'rewards[1].functoin'; did you mean 'function'?",
    ),
    "duplicate key": ("seed: 1\noutput: a\nseed: 2\n", "job.yaml:3: seed is set twice"),
    "text for a whole number": ("seed: one\n", "job.yaml:1: seed: 'one' is not a whole number"),
    "fraction for a whole number": ("seed: 1.5\n", "job.yaml:1: seed: '1.5' is not a whole number"),
    "true for a whole number": ("seed: true\n", "job.yaml:1: seed: 'true' is not a whole number"),
    "text for a number": (
        "algorithm: {learning_rate: fast}\n",
        "job.yaml:1: algorithm.learning_rate: 'fast' is not a number",
    ),
    "true for a number": ("algorithm: {eps_low: true}\n", "job.yaml:1: algorithm.eps_low: 'true' is not a number"),
    "text for a flag": ("\ndata:\n  strict: 1\n", "job.yaml:3: data.strict: '1' is not true or false"),
    "number for text": ("output: 3\n", "job.yaml:1: output: '3' is not text"),
    "null for a whole number": ("seed: null\n", "job.yaml:1: seed: 'null' is not a whole number"),
    "wrong choice": (
        "algorithm:\n  schedule: step\n",
        "job.yaml:2: algorithm.schedule: 'step' is not one of constant, linear, cosine",
    ),
    "mapping for a list": ("rewards: {function: accuracy}\n", "job.yaml:1: rewards: a mapping is not a list"),
    "text in a list of sections": (
        "rewards: [accuracy]\n",
        "job.yaml:1: rewards[0]: 'accuracy' is not a mapping of keys to values",
    ),
    "number in a list of text": (
        "model:\n  build:\n    tokenizer_files:\n      - a\n      - 2\n",
        "job.yaml:5: model.build.tokenizer_files[1]: '2' is not text",
    ),
    "list for a section": ("data: [a]\n", "job.yaml:1: data: a sequence is not a mapping of keys to values"),
    "list for a free mapping": (
        "model: {build: {decoder: [1]}}\n",
        "job.yaml:1: model.build.decoder: a sequence is not a mapping of keys to values",
    ),
    "text for the whole file": ("grpo\n", "job.yaml:1: GRPOConfig: 'grpo' is not a mapping of keys to values"),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_one_line(load, tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        load(text)
    assert message_of(error, tmp_path) == expected


def test_broken_yaml_names_the_line(load, tmp_path):
    with pytest.raises(UserError) as error:
        load("seed: 1\nmodel: {path: a\noutput: b\n")
    assert message_of(error, tmp_path).startswith("job.yaml:3: not YAML: ")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: no such config file"):
        load_config(GRPOConfig, tmp_path / "nowhere.yaml")


def test_overrides(load):
    config = load(
        "seed: 1\nrollout: {slots: 4}\nmodel: {path: a}\n",
        "seed=2", "rollout.sampling.temperature=0.5", "rollout.sampling.max_tokens=9", "algorithm.learning_rate=3e-4",
        "model.path=", "rewards=[{function: format, weight: 2}]", "algorithm.kl_coef=null", "logging.progress=false",
    )  # fmt: skip
    assert config.seed == 2
    assert config.rollout.slots == 4
    assert (config.rollout.sampling.temperature, config.rollout.sampling.max_tokens) == (0.5, 9)
    assert config.algorithm.learning_rate == 3e-4
    assert config.model.path == ""
    assert config.rewards == [RewardFunctionConfig("format", 2.0)]
    assert config.algorithm.kl_coef is None
    assert config.logging.progress is False


def test_the_last_override_wins(load):
    assert load("", "seed=2", "seed=3").seed == 3


def test_value_may_hold_an_equals_sign(load):
    assert load("", "data.input_template=Q={} A=").data.input_template == "Q={} A="


BAD_OVERRIDES = {
    "seed": "override 'seed': write it as section.key=value",
    "=3": "override '=3': write it as section.key=value",
    "seed=[1": "override 'seed=[1': the value is not YAML; text such as @ or a: b needs quotes of its own, key='\"@\"'",
    "seed=x": "override 'seed=x': seed: 'x' is not a whole number",
    "rollout.slot=3": "override 'rollout.slot=3': unknown key 'rollout.slot'; did you mean 'slots'?",
    "seed.deep=3": "override 'seed.deep=3': seed: a mapping is not a whole number",
    "algorithm.schedule=step": (
        "override 'algorithm.schedule=step': algorithm.schedule: 'step' is not one of constant, linear, cosine"
    ),
}


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES.keys())
def test_bad_override_names_itself(load, tmp_path, override, expected):
    with pytest.raises(UserError) as error:
        load("seed: 1\n", override)
    assert message_of(error, tmp_path) == expected


def test_a_section_that_is_given_in_part_keeps_the_jobs_defaults(load, tmp_path):
    from mindrlhf.config import SFTConfig

    path = tmp_path / "sft.yaml"
    path.write_text("data: {prompt_key: question}\n")
    assert load_config(SFTConfig, path).data.strict is SFTConfig().data.strict is False
    assert load_config(SFTConfig, path, ["data.strict=true"]).data.strict is True
    assert load_config(GRPOConfig, path).data.strict is True


def test_a_run_of_another_job_is_called_that():
    from mindrlhf.config import DPOConfig, KTOConfig, difference

    there, here = config_to_yaml(KTOConfig()), config_to_yaml(DPOConfig())
    assert difference(there, here, []).startswith("of another job or version: loss.desirable_weight, loss.gamma")
