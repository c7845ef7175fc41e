"""Every offline stage: it learns, and how the work is split, packed or interrupted changes nothing."""

import numpy as np
import pytest

from mindrlhf.errors import UserError
from tests.trainer.stages import STAGES, losses, weights

# CI goes through all of them; the suite through one of each kind.
EVERY = [stage if stage == "dpo" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]


@pytest.mark.parametrize("stage", EVERY)
def test_split_and_packing_change_nothing(stage, make_stage):
    """One, several and many micro-batches; several examples a row, and one."""

    def run(rows, row_tokens):
        trainer = make_stage(
            stage, "training.batch_size=16", f"trainer.rows={rows}", f"trainer.row_tokens={row_tokens}",
            "optimizer.epsilon=1e-8", output=f"{rows}-{row_tokens}",
        )  # fmt: skip
        taken = losses(trainer)
        return taken, trainer.batches("train", range(16)), trainer.longest

    whole, batches, longest = run(16, 32)
    packed = batches[0].segments.max()
    assert len(batches) == 1 and whole[-1] < whole[0]
    for rows, fewest in ((2, 2), (1, 4)):
        split, batches, _ = run(rows, 32)
        assert len(batches) >= fewest
        assert np.abs(np.array(split) - whole).max() < 1e-6, rows
    unpacked, batches, _ = run(16, longest)
    assert all(batch.segments.max() < packed for batch in batches)
    assert np.abs(np.array(unpacked) - whole).max() < 1e-6


@pytest.mark.parametrize("stage", EVERY)
def test_resumed_is_uninterrupted(stage, make_stage):
    def run(steps, output):
        trainer = make_stage(stage, f"trainer.steps={steps}", "training.schedule=constant", output=output)
        return trainer, trainer.fit()

    whole, whole_summary = run(6, "whole")
    run(3, "parts")
    resumed, summary = run(6, "parts")
    assert summary["steps"] == 6 and summary["after"] == whole_summary["after"]
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(resumed)[name]), name


LORA = ("model.path=TEACHER", "model.lora.rank=2", "model.lora.target_modules=[q_proj, up_proj]")


@pytest.mark.parametrize("stage", ["sft", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("rm", "dpo"))])
def test_only_adapters_are_trained_and_dropout_is_resumed(stage, make_stage):
    options = (*LORA, "model.lora.dropout=0.3", "training.schedule=constant")

    def run(steps, output):
        trainer = make_stage(stage, *options, f"trainer.steps={steps}", output=output)
        before = {p.name: p.asnumpy().copy() for p in trainer.policy.decoder.get_parameters()}
        trainer.fit()
        return trainer, before

    whole, before = run(6, "whole")
    trained = {parameter.name for parameter in whole.policy.trainable}
    assert all(".lora_" in name or name == "score.weight" for name in trained)
    for parameter in whole.policy.decoder.get_parameters():
        if parameter.name not in trained:
            assert np.array_equal(parameter.asnumpy(), before[parameter.name]), parameter.name
        elif ".lora_B" in parameter.name:
            assert parameter.asnumpy().any(), parameter.name
    run(3, "parts")
    resumed, _ = run(6, "parts")
    for name, array in weights(whole).items():
        assert np.array_equal(array, weights(resumed)[name]), name


def test_only_the_chosen_layers_are_trained(make_stage):
    trainer = make_stage("rm", "model.train_layers=[0]")
    names = {parameter.name for parameter in trainer.policy.trainable}
    assert "score.weight" in names and all(n.startswith("model.layers.0.") or n == "score.weight" for n in names)
    embedding = weights(trainer)["model.embed_tokens.weight"]
    before = trainer.evaluate()["loss"]
    losses(trainer, 20)
    assert trainer.evaluate()["loss"] < before - 0.1
    assert np.array_equal(weights(trainer)["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("stage", ["dpo", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("sft", "kto"))])
def test_epochs_compile_nothing_new(stage, make_stage, compilations):
    trainer = make_stage(stage)
    losses(trainer, 4)
    trainer.evaluate()
    seen = compilations()
    losses(trainer, 12)
    trainer.evaluate()
    assert compilations() == seen


def test_the_summary_counts_skipped_rows(make_stage, tmp_path, stage_rows):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(stage_rows.read_text() + '{"prompt": "1=", "chosen": "one", "rejected": "one"}\n')
    skipped = make_stage("dpo", f"data.train=[{{path: {bad}}}]", "data.max_rows=0", "trainer.steps=1").fit()
    assert skipped["skipped_rows"] == {"train": {"chosen equals rejected": 1}}
    with pytest.raises(UserError, match=r"bad.jsonl:25: .*strict"):
        make_stage("dpo", f"data.train=[{{path: {bad}}}]", "data.max_rows=0", "data.strict=true")


MISTAKES = {
    "batch": ("sft", ["training.batch_size=0"], "training.batch_size: 0 must be 1 or more"),
    "window": ("sft", ["training.max_tokens=65"], "training.max_tokens: 65 is more than the model's window, 64"),
    "rows": ("dpo", ["trainer.row_tokens=8"], "trainer.row_tokens: 8, but one example can need"),
    "no data": ("sft", ["data.train=[]"], "data.train: no file is named"),
    "loss": ("dpo", ["loss.name=dpoo"], "loss.name: 'dpoo' is unknown; there are dpo, cdpo"),
    "smoothing": ("dpo", ["loss.label_smoothing=0.1"], "loss.label_smoothing: dpo has none; use cdpo or robust"),
    "too smooth": ("dpo", ["loss.name=cdpo", "loss.label_smoothing=0.5"], "0.5 must be 0 or more and under 0.5"),
    "no adapter": ("kto", ["loss.reference=adapter_off"], "loss.reference: adapter_off needs adapters"),
    "teacher": ("kd", ["distillation.teacher="], "distillation.teacher: no checkpoint is named"),
    "on-policy kd": ("kd", ["distillation.on_policy=0.5"], "set distillation.coef=1 or distillation.name=gkd"),
    "share": ("kd", ["distillation.on_policy=2"], "distillation.on_policy: 2.0 is not a share"),
    "beta": ("dpo", ["loss.beta=0"], "loss.beta: 0.0 must be over 0"),
    "temperature": ("kd", ["distillation.temperature=0"], "distillation.temperature: 0.0 must be over 0"),
    "no reference": ("sft", ["model.reference=TEACHER"], "model.reference: this job has no reference policy"),
    "none for simpo": ("dpo", ["loss.name=simpo", "model.reference=TEACHER"], "this job has no reference policy"),
    "no margin": ("dpo", ["data.margin_key=score"], "data.margin_key: only reward models have a margin"),
    "beta1": ("sft", ["optimizer.beta1=1"], "optimizer.beta1: 1.0 must be at least 0 and under 1"),
    "evaluate": ("sft", ["trainer.evaluate_rows=-1"], "trainer.evaluate_rows: -1 must be 0 (all) or more"),
    "epochs": ("sft", ["trainer.epochs=0"], "trainer.epochs: 0 must be 1 or more"),
    "placeholder": ("prm", ["steps.placeholder=two tokens"], "steps.placeholder: 'two tokens' is"),
}


@pytest.mark.parametrize(("stage", "overrides", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_one_line(stage, overrides, message, make_stage):
    with pytest.raises(UserError) as error:
        losses(make_stage(stage, *overrides), 1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_jobs_config(make_stage):
    import mindrlhf

    with pytest.raises(UserError, match="DPOTrainer takes a DPOConfig, not a SFTConfig"):
        mindrlhf.DPOTrainer(mindrlhf.SFTConfig())


def test_one_judgement_is_not_enough(make_stage):
    with pytest.raises(UserError, match="one row is not enough"):
        make_stage("kto", "data.max_rows=1")
