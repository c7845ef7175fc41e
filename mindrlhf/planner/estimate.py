"""Seconds of a step, from rates. Not a simulation: no overlap of computation and communication, balanced ranks."""

import math
from functools import cache

from mindrlhf.layout import Layout
from mindrlhf.planner.architecture import Architecture
from mindrlhf.planner.job import Arrangement, Devices, Job
from mindrlhf.planner.memory import numbers_on_rank
from mindrlhf.planner.sync import weight_sync

GENERATE, SCORE, TRAIN, SYNC, SWAP = "generate", "score", "train", "sync", "swap"


def step_seconds(job: Job, devices: Devices, arrangement: Arrangement) -> dict[str, float]:
    """By part of the step. docs/planner.md has the formulas."""
    training, generation = arrangement.training, arrangement.generation
    forward = [model for model in (job.reference, job.critic, *job.reward_models) if model]
    forward += [job.policy] * job.rescore
    trained = [(job.policy, 3)] + ([(job.critic, 3)] if job.critic else [])
    numbers = devices.numbers
    sync = weight_sync(job.policy, training, generation, numbers.weight)
    seconds = {
        GENERATE: generation_seconds(job, devices, generation),
        SCORE: sum(pass_seconds(model, job, devices, arrangement, 1) for model in forward),
        TRAIN: sum(_training_seconds(model, job, devices, arrangement) for model, _ in trained),
        SYNC: sync.most / devices.link(max(training.tensor, generation.tensor)),
    }
    if job.swap:
        seconds[SWAP] = _swap_seconds(job, devices, training)
    return seconds


@cache
def generation_seconds(job: Job, devices: Devices, layout: Layout) -> float:
    """Prefill by operations; each decode step by the bytes it reads or its operations, whichever takes longer."""
    model, numbers = job.policy, devices.numbers
    prompts = math.ceil(job.prompts_per_step / layout.data)
    answers = math.ceil(job.answers / layout.data)
    slots = min(job.slots, answers)
    prefill = 2 * prompts * job.prompt_tokens * model.active_parameters / layout.tensor / devices.flops
    touched = numbers_on_rank(tuple(weight for weight in model.weights if not weight.is_routed), layout)
    routed = numbers_on_rank(tuple(weight for weight in model.weights if weight.is_routed), layout)
    if routed:  # of the experts that at least one of the slots' tokens has chosen
        touched += routed * (1 - (1 - model.experts_per_token / model.num_experts) ** slots)
    length = job.prompt_tokens + job.answer_tokens / 2
    cache = slots * length * model.num_layers * model.cache_width / model.cache_ranks(layout)
    read = (numbers.weight * touched + numbers.activation * cache) / devices.memory_bandwidth
    computed = 2 * slots * model.active_parameters / layout.tensor / devices.flops
    summed = _reductions(model, devices, layout, slots, 2)
    steps = math.ceil(answers / slots) * job.answer_tokens
    return prefill + steps * (max(read, computed) + summed)


def pass_seconds(model: Architecture, job: Job, devices: Devices, arrangement: Arrangement, passes: int) -> float:
    """Over all answers of the step; passes: 1 forward, 3 forward and backward (two products for each one)."""
    layout = arrangement.training
    answers = math.ceil(job.answers / layout.data / job.updates)  # of one replica and update
    packed = math.ceil(answers / max(job.row_tokens // job.length, 1))
    batches = job.updates * math.ceil(packed / arrangement.rows)
    tokens = batches * arrangement.rows * job.row_tokens  # rows that stay empty are computed too
    attention = 2 * model.num_heads * _attention_width(model) * job.length * model.num_layers / 2  # half is masked
    operations = passes * tokens * (2 * model.active_parameters + attention) / (layout.tensor * layout.sequence)
    own = arrangement.rows * job.row_tokens / layout.sequence
    reductions = batches * _reductions(model, devices, layout, own, 2 if passes == 1 else 4)
    gathered = 0.0
    if layout.sequence > 1:
        keys = own * layout.sequence * _gathered_width(model) / layout.tensor * devices.numbers.activation
        once = keys / devices.link(layout.tensor * layout.sequence) + devices.latency
        gathered = batches * passes * model.num_layers * once
    return operations / devices.flops + reductions + gathered


def _training_seconds(model: Architecture, job: Job, devices: Devices, arrangement: Arrangement) -> float:
    layout, numbers = arrangement.training, devices.numbers
    trains_all = model is not job.policy or job.trainable is None
    count = numbers_on_rank(model.weights if trains_all else job.trainable, layout)
    updates = job.epochs * job.updates
    replicas = layout.data * layout.sequence
    summed = 2 * (replicas - 1) / replicas * numbers.gradient * count / devices.link(layout.size) + devices.latency
    gathered = (
        numbers.weight * count * (layout.data - 1) / layout.data / devices.link(layout.size) if layout.zero else 0
    )
    shares = layout.data if layout.zero else 1
    moved = 2 * (numbers.moments + numbers.gradient + numbers.weight) * count / shares / devices.memory_bandwidth
    update = (summed if replicas > 1 else 0) + gathered + moved
    return job.epochs * pass_seconds(model, job, devices, arrangement, 3) + updates * update


def _reductions(model: Architecture, devices: Devices, layout: Layout, tokens: float, each: int) -> float:
    """Of the tensor ranks: `each` sums of [tokens, hidden] a layer, a ring that sends every byte twice."""
    ranks = layout.tensor
    if ranks == 1:
        return 0.0
    size = tokens * model.hidden_size * devices.numbers.activation
    once = 2 * (ranks - 1) / ranks * size / devices.link(ranks) + devices.latency
    return model.num_layers * each * once


def _attention_width(model: Architecture) -> int:
    """Of one head's scores and of its sum of values."""
    latent = model.latent
    return latent.nope + latent.rope + latent.value if latent else 2 * model.head_dim


def _gathered_width(model: Architecture) -> int:
    return model.num_heads * _attention_width(model) if model.latent else 2 * model.num_kv_heads * model.head_dim


def _swap_seconds(job: Job, devices: Devices, layout: Layout) -> float:
    """What is put away goes out and comes in once a step: nothing of it is hidden by prefetch."""
    numbers = devices.numbers
    shares = layout.data if layout.zero else 1
    master = numbers.master_with_zero if layout.zero else numbers.master
    moved = 0.0
    for model in (job.policy, job.critic):
        if model:
            trained = model.weights if model is job.critic or job.trainable is None else job.trainable
            moved += (numbers.moments + master) * numbers_on_rank(trained, layout) / shares
    for model in (job.policy, job.reference, job.critic, *job.reward_models):
        if model:
            moved += numbers.weight * numbers_on_rank(model.weights, layout)
    return 2 * moved / devices.swap_bandwidth
