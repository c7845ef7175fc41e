"""Training over several processes is training in one: the same rollouts, the same losses, the same files."""

import json

import numpy as np
import pytest

from mindrlhf.models.hf import read_tensors
from tests.processes import run_ranks
from tests.trainer import parallel_job

JOB = parallel_job.__file__
TIMES = ("time", "seconds", "tokens_per_second", "memory")  # metrics that are a machine's, not a run's
TOLERANCE = 1e-5


def run(directory, count, *cases, timeout=900):
    for done in run_ranks([JOB, str(directory), *cases], count, timeout):
        assert done.code == 0, done.output[-3000:]


def metrics_of(run_directory):
    """Of the steps, and of the last evaluation: a run that is made in parts is evaluated at the end of each."""
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in (*steps, lines[-1])]


def completions_of(run_directory):
    return (run_directory / "completions.jsonl").read_text()  # empty where nothing is generated


def assert_same_run(directory, name, reference, step=20, left_out="nothing"):
    """Weights and optimizer of the last checkpoint, and every metric of every step."""
    one, other = directory / reference, directory / name
    for folder in sorted(path.parent for path in (one / f"checkpoints/step-{step:06d}").rglob("*.safetensors")):
        ours, theirs = read_tensors(other / folder.relative_to(one)), read_tensors(folder)
        assert set(ours) == set(theirs)
        for tensor in (one for one in theirs if not one.endswith(left_out)):
            np.testing.assert_allclose(ours[tensor], theirs[tensor], atol=TOLERANCE, err_msg=f"{name} {tensor}")
    ours, theirs = metrics_of(other), metrics_of(one)
    assert len(ours) == len(theirs) >= step
    for mine, line in zip(ours, theirs, strict=True):
        assert mine.keys() == line.keys()
        for key, value in line.items():
            assert mine[key] == pytest.approx(value, abs=TOLERANCE, rel=1e-4), (name, line["step"], key)
    assert completions_of(other) == completions_of(one)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """With data, and the runs of one process that the others are held against, made at their first use."""
    directory = tmp_path_factory.mktemp("parallel")
    parallel_job.write_data(directory)
    return directory


@pytest.fixture()
def reference(directory):
    def make(name, kind, overrides=""):
        if not (directory / name).exists():
            run(directory, 1, f"{name}:{kind}:{overrides}")
        return name

    return make


DUMP = "logging.completions_every=1"


def test_two_processes_train_as_one_and_generate_in_another_layout(directory, reference):
    short = f"{DUMP};trainer.steps=3"
    less = "model.logits_at_once=1000;model.recompute=true"  # which is the same, and here with collectives in it
    run(directory, 2, f"short_tensor:grpo:{short};{less};parallel.tensor=2;rollout.parallel.tensor=1")
    assert_same_run(directory, "short_tensor", reference("short", "grpo", short), step=3)


@pytest.mark.slow
def test_every_layout_of_two_processes(directory, reference):
    layouts = {
        "data2": "parallel.zero=true;rollout.parallel.tensor=2",
        "sequence2": "parallel.sequence=2",
        "tensor2_subset": "parallel.tensor=2;rollout.parallel.tensor=1;rollout.parallel.data=1",
    }
    run(directory, 2, *(f"{name}:grpo:{DUMP};{layout}" for name, layout in layouts.items()))
    for name in layouts:
        assert_same_run(directory, name, reference("grpo", "grpo", DUMP))


@pytest.mark.slow
def test_every_layout_of_four_processes_and_a_run_that_changes_it(directory, reference):
    layouts = {
        "tensor4": "parallel.tensor=4;rollout.parallel.tensor=2",
        "tensor2_data2": "parallel.tensor=2;parallel.zero=true;rollout.parallel.tensor=1",
        "tensor2_sequence2": "parallel.tensor=2;parallel.sequence=2;rollout.parallel.tensor=4",
    }
    changing = (
        f"changing:grpo:{DUMP};trainer.steps=7;parallel.tensor=2;parallel.zero=true",
        f"changing:grpo:{DUMP};trainer.steps=13;parallel.data=4;parallel.zero=true;rollout.parallel.data=2",
        f"changing:grpo:{DUMP};trainer.steps=20;parallel.tensor=4",
    )
    run(directory, 4, *(f"{name}:grpo:{DUMP};{layout}" for name, layout in layouts.items()), *changing, timeout=1800)
    for name in (*layouts, "changing"):
        assert_same_run(directory, name, reference("grpo", "grpo", DUMP))


@pytest.mark.slow
def test_other_online_trainers_in_two_processes(directory, reference):
    ppo = f"{DUMP};critic.learning_rate=1e-3;algorithm.kl_coef=0.02;algorithm.ema_decay=0.9;memory.swap=true"
    cases = {
        "ppo": ("ppo", ppo, "parallel.tensor=2;rollout.parallel.tensor=1"),
        "mixtral": ("grpo_mixtral", DUMP, "parallel.tensor=2;parallel.expert=2;rollout.parallel.expert=1"),
    }
    run(directory, 2, *(f"{name}2:{kind}:{common};{layout}" for name, (kind, common, layout) in cases.items()))
    for name, (kind, common, _) in cases.items():
        assert_same_run(directory, f"{name}2", reference(f"{name}1", kind, common))


@pytest.mark.slow
def test_families_in_two_processes(directory, reference):
    common = f"{DUMP};trainer.steps=3"
    # Attention does not see a bias that all keys share and nothing rotates: its gradient is rounding, of which Adam
    # makes whole steps.
    left_out = ("layers.0.self_attn.k_proj.bias", "h.0.attn.c_attn.bias")
    layouts = {
        "qwen3": "parallel.tensor=2;rollout.parallel.tensor=1",
        "glm4": "parallel.tensor=2;rollout.parallel.tensor=1",
        "gpt2": "parallel.tensor=2;rollout.parallel.tensor=1",
        "deepseek_v3": "parallel.tensor=2;parallel.expert=2;rollout.parallel.expert=1",
        "deepseek_v3_rows": "parallel.sequence=2",
    }
    kinds = {name: f"grpo_{name.removesuffix('_rows')}" for name in layouts}
    run(directory, 2, *(f"{name}2:{kinds[name]}:{common};{layout}" for name, layout in layouts.items()))
    for name in layouts:
        assert_same_run(directory, f"{name}2", reference(f"{kinds[name]}1", kinds[name], common), 3, left_out)


@pytest.mark.slow
def test_every_offline_stage_in_two_processes(directory):
    """Tensor ranks for some, data ranks for the others, sequence ranks for one; a few steps each."""
    layouts = {
        "sft": "parallel.sequence=2",
        "rm": "parallel.tensor=2",
        "prm": "parallel.tensor=2",
        "dpo": "parallel.data=2;parallel.zero=true",
        "kto": "parallel.data=2",
        "kd": "parallel.tensor=2",
    }
    few = "trainer.steps=4"
    teacher = "teacher:sft:trainer.steps=2;seed=3"
    run(directory, 1, teacher, *(f"{stage}1:{stage}:{few}" for stage in layouts))
    run(directory, 2, *(f"{stage}2:{stage}:{few};{layout}" for stage, layout in layouts.items()))
    for stage in layouts:
        assert_same_run(directory, f"{stage}2", f"{stage}1", step=4)
