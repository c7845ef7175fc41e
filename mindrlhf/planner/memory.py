"""Bytes of one rank by phase, role and kind. docs/planner.md derives every formula."""

from functools import cache

from mindrlhf.data.packing import bucket
from mindrlhf.layout import Layout
from mindrlhf.planner.activations import backward_numbers, forward_numbers, head_bytes, kept_numbers, layer_weights
from mindrlhf.planner.architecture import Architecture, Weight
from mindrlhf.planner.host import executor_bytes
from mindrlhf.planner.job import Arrangement, Devices, Job
from mindrlhf.utils.reshard_plan import BUCKET_BYTES

GENERATE, SCORE, TRAIN_POLICY, TRAIN_CRITIC = "generate", "score", "train policy", "train critic"
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
ACTIVATIONS, CACHE, RESHARD, RUNTIME = "activations", "KV cache", "reshard buffers", "runtime"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, CACHE, RESHARD, RUNTIME)
POLICY, CRITIC, REFERENCE, GENERATOR, EXECUTOR = "policy", "critic", "reference", "generator", "executor"

CACHE_STEP = 64  # the cache's length is a multiple of it
PREFILL_ROWS = 8  # prompts a prefill

Use = dict[tuple[str, str], float]  # (role, kind) -> bytes


def total(use: Use) -> float:
    return sum(use.values())


def peak(phases: dict[str, Use]) -> tuple[str, float]:
    """The phase that needs most, and its bytes."""
    return max(((name, total(use)) for name, use in phases.items()), key=lambda pair: pair[1])


def numbers_on_rank(weights: tuple[Weight, ...], layout: Layout) -> float:
    """How many numbers of those tensors one rank holds."""
    split, whole = _numbers(weights)
    return split / layout.tensor + whole


@cache
def _numbers(weights: tuple[Weight, ...]) -> tuple[int, int]:
    """Of the tensors that tensor ranks split, and of the others."""
    split = sum(weight.numbers for weight in weights if weight.is_split)
    return split, sum(weight.numbers for weight in weights) - split


def plan_phases(job: Job, devices: Devices, arrangement: Arrangement) -> dict[str, Use]:
    """What one rank holds at the peak of each phase."""
    names = [GENERATE, SCORE, TRAIN_POLICY] + [TRAIN_CRITIC] * (job.critic is not None)
    phases: dict[str, Use] = {name: {} for name in names}
    _add_models(phases, job, devices, arrangement)
    _add_generator(phases, job, devices, arrangement)
    _add_activations(phases, job, devices, arrangement)
    if devices.host_process:
        for use in phases.values():
            use[EXECUTOR, RUNTIME] = executor_bytes(job)
        # MindSpore's pool on a CPU keeps what activations have needed, through every later phase.
        kept = max(_activations(use) for use in phases.values())
        for use in phases.values():
            use[EXECUTOR, ACTIVATIONS] = kept - _activations(use)
    return {name: {key: value for key, value in use.items() if value} for name, use in phases.items()}


def _activations(use: Use) -> float:
    return sum(value for (_, kind), value in use.items() if kind == ACTIVATIONS)


def _add_models(phases: dict[str, Use], job: Job, devices: Devices, arrangement: Arrangement) -> None:
    """Weights and what training adds to them. With swap a role is there in the phases that use it."""
    numbers, layout = devices.numbers, arrangement.training
    scored = [SCORE] if job.rescore else []
    held = [(POLICY, job.policy.weights + job.adapters, [GENERATE, *scored, TRAIN_POLICY])]
    if job.critic:
        held.append((CRITIC, job.critic.weights, [SCORE, TRAIN_CRITIC]))
    if job.reference:
        held.append((REFERENCE, job.reference.weights, [SCORE]))
    for number, model in enumerate(job.reward_models, 1):
        held.append((f"reward model {number}", model.weights, [SCORE]))
    for role, weights, used in held:
        for phase in used if job.swap else phases:
            phases[phase][role, WEIGHTS] = numbers.weight * numbers_on_rank(weights, layout)
    trained = [(POLICY, TRAIN_POLICY, job.policy.weights if job.trainable is None else job.trainable)]
    if job.critic:
        trained.append((CRITIC, TRAIN_CRITIC, job.critic.weights))
    shares = layout.data if layout.zero else 1
    master = numbers.master_with_zero if layout.zero else numbers.master
    training = [phase for phase in (TRAIN_POLICY, TRAIN_CRITIC) if phase in phases]
    for role, own, weights in trained:
        count = numbers_on_rank(weights, layout)
        for phase in [own] if job.swap else phases:
            phases[phase][role, OPTIMIZER] = (numbers.moments + master) * count / shares
        for phase in [own] if job.swap else training:  # the buffers are given back behind the last update
            phases[phase][role, GRADIENTS] = numbers.gradient * count


def _add_generator(phases: dict[str, Use], job: Job, devices: Devices, arrangement: Arrangement) -> None:
    """A decoder of its own, whose head is a matrix of its own even where the policy's is the embedding."""
    layout, numbers, model = arrangement.generation, devices.numbers, job.policy
    head = (Weight("lm_head.weight", (model.vocab_size, model.hidden_size)),) if model.tie_embeddings else ()
    length = min(-(-job.length // CACHE_STEP) * CACHE_STEP, model.max_positions)
    cache = job.slots * length * model.num_layers * model.cache_width / model.cache_ranks(layout)
    for phase in phases if job.asynchronous else [GENERATE]:
        phases[phase][GENERATOR, WEIGHTS] = numbers.weight * numbers_on_rank(model.weights + head, layout)
        phases[phase][GENERATOR, CACHE] = numbers.activation * cache
    if arrangement.training.size > 1:
        phases[GENERATE][GENERATOR, RESHARD] = BUCKET_BYTES


def _add_activations(phases: dict[str, Use], job: Job, devices: Devices, arrangement: Arrangement) -> None:
    width, layout = devices.numbers.activation, arrangement.training
    generation, model = arrangement.generation, job.policy
    # A step of decoding, or a prefill, whose keys and values wait to be copied into the slots.
    prompts = min(PREFILL_ROWS, job.slots) * job.prompt_tokens
    cached = prompts * model.num_layers * model.cache_width / model.cache_ranks(generation)
    prefill = width * (prompts * forward_numbers(model, generation) + cached)
    decode = (
        width * job.slots * forward_numbers(model, generation) + 4 * job.slots * model.vocab_size / generation.tensor
    )
    phases[GENERATE][GENERATOR, ACTIVATIONS] = max(prefill, decode)

    tokens = arrangement.rows * job.row_tokens / layout.sequence
    targets = bucket(arrangement.rows * row_targets(job)) / layout.sequence
    scorers = [(REFERENCE, job.reference), (POLICY, job.policy if job.rescore else None), (CRITIC, job.critic)]
    scorers += [(f"reward model {i}", one) for i, one in enumerate(job.reward_models, 1)]
    needs = [(role, width * tokens * forward_numbers(one, layout) + head_bytes(one, layout, targets, width, 1))
             for role, one in scorers if one]  # fmt: skip
    if needs:  # one after the other, so the largest
        role, most = max(needs, key=lambda pair: pair[1])
        phases[SCORE][role, ACTIVATIONS] = most
    for role, phase, one in ((POLICY, TRAIN_POLICY, job.policy), (CRITIC, TRAIN_CRITIC, job.critic)):
        if one:
            phases[phase][role, ACTIVATIONS] = training_bytes(one, layout, tokens, targets, width, devices.host_process)


def row_targets(job: Job) -> int:
    """Answer tokens of a packed row, if answers are as long as they may be and prompts short."""
    answers = max(job.row_tokens // (job.answer_tokens + 1), 1)
    return min(answers * job.answer_tokens, job.row_tokens - answers)


def training_bytes(
    model: Architecture, layout: Layout, tokens: float, targets: float, width: int, gradients_last: bool
) -> float:
    """The most that one micro-batch's forward and backward pass hold besides parameters and gradient buffers.

    As the backward pass begins, every layer's kept numbers are there; then either the head works on them, or the last
    layer does, whose gradients are not yet in their buffers. gradients_last: as MindSpore runs the graph on a CPU,
    where gradients wait for the end to be added to their buffers. They are put where activations were, if they fit in
    there: a gradient [hidden, n] into an activation [tokens, n].
    """
    kept = width * tokens * kept_numbers(model, layout)
    head = head_bytes(model, layout, targets, width, 2)
    layers = width * numbers_on_rank(layer_weights(model), layout)
    is_tied = model.tie_embeddings and model.head == "logits"
    tied = width * model.vocab_size * model.hidden_size / layout.tensor if is_tied else 0.0
    working = width * tokens * backward_numbers(model, layout) + layers / model.num_layers
    begins = kept + max(head, working + tied)
    if not gradients_last:
        return begins
    ends = width * numbers_on_rank(model.weights, layout) + tied
    return max(begins, ends + (kept if tokens < model.hidden_size else 0.0))
