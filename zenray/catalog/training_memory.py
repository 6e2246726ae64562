"""What one worker of a training job must hold: weights, gradients, moments, activations and buffers, in bytes.

Weights, gradients and moments are counted tensor by tensor as `zenray.training` cuts them, and are exact. Activations
are counted by the tensors that the network's layers keep for the backward pass; the tests hold them against what
autograd really keeps. Sequences are taken to be full, and rows to be spread evenly over experts.

B sequences of a pass, S tokens of each, D hidden, E experts, k experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Literal

from zenray.spec.dimensions import ModelDimensions, MoeDimensions
from zenray.spec.parallelism import Axes

Part = Literal["dense", "routers", "experts"]
Recomputed = Literal["none", "selective", "full"]
BUCKET_BYTES = 64 << 20  # of gradients that are added up in one message (zenray.training.gradients)
BLOCK = 256  # moments in 8 bits with a scale in float32 (zenray.training.optimizer)
CHUNK_TOKENS = 1024  # whose logits are in memory at once (zenray.model.distillation)


_NOTHING_SHARED = Axes()


@dataclass(frozen=True)
class TrainingLayout:
    """How workers share a network."""

    workers: int = 1
    axes: Axes = _NOTHING_SHARED
    fully_sharded: bool = False

    @property
    def stages(self) -> int:
        return self.axes.pipeline

    @property
    def of_stage(self) -> int:
        """Workers that hold parts of one stage's weights."""
        return self.axes.of_stage(self.workers)


@dataclass(frozen=True)
class Settings:
    """What else of a job decides about memory. `learning`: the parts that are trained."""

    learning: frozenset[Part]
    half: bool  # bfloat16 arithmetic with float32 masters
    recomputed: Recomputed
    sequences: int  # of one pass of one worker
    sequence_tokens: int  # of this worker's part of each
    passes: int  # of one worker in a step: their gradients are added up
    gpu: bool
    moments_in_8_bits: bool = False
    context: int = 1  # workers that share each sequence, and gather one another's keys and values

    @property
    def item_bytes(self) -> int:
        return 2 if self.half else 4

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_tokens

    @property
    def whole_tokens(self) -> int:
        """Of a sequence on all workers that share it."""
        return self.sequence_tokens * self.context

    @property
    def accumulates(self) -> bool:
        return self.passes > 1


@dataclass(frozen=True)
class Teacher:
    """A network that runs beside the student. `is_whole`: on every worker, also where the student is cut, as those are
    whose likeliest tokens are kept (zenray.training.teachers). `share_of_tokens`: those that it is run on."""

    dimensions: ModelDimensions
    is_whole: bool = False
    share_of_tokens: float = 1.0


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes at one moment of a step. `weights`: with the float32 masters where they are copies."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int  # of one chunk, with the head's gradient
    buffers: int  # weights gathered, gradients on their way
    teachers: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, one.name) for one in fields(self))


@dataclass(frozen=True)
class StepMemory:
    """A worker's memory at the three moments of a step of which one is the fullest."""

    loss: WorkerMemory  # all activations, and logits
    backward_begins: WorkerMemory  # all activations, and what the last layer recomputes
    backward_ends: WorkerMemory  # all gradients, and the first layer

    @property
    def fullest(self) -> WorkerMemory:
        return max((self.loss, self.backward_begins, self.backward_ends), key=lambda moment: moment.total)


@dataclass(frozen=True)
class Weight:
    """One parameter, as the network has it. `part`: as what it is cut. A domain block is an expert that is cut like a
    dense weight."""

    part: Part
    shape: tuple[int, ...]
    of_block: bool = False

    @property
    def learns_with(self) -> Part:
        return "experts" if self.of_block else self.part

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layer_weights(dimensions: ModelDimensions, layer: int) -> Iterator[Weight]:
    """Every parameter of one decoder layer."""
    D, q, kv = dimensions.hidden_size, dimensions.q_width, dimensions.kv_width
    yield from (Weight("dense", shape) for shape in ((q, D), (kv, D), (kv, D), (D, q), (D,), (D,)))
    if dimensions.qk_norm:
        yield from (Weight("dense", (dimensions.head_dim,)),) * 2
    if dimensions.qkv_bias:
        yield from (Weight("dense", (width,)) for width in (q, kv, kv))
    if dimensions.o_bias:
        yield Weight("dense", (D,))
    moe = dimensions.moe
    if moe is None or layer in dimensions.dense_layers:
        yield from _swiglu(D, dimensions.ffn_width)
        return
    yield Weight("routers", (moe.experts, D))
    for width, run in groupby(moe.widths):  # a bank for each run of equal widths
        experts = len(list(run))
        yield Weight("experts", (experts, 2 * width, D))
        yield Weight("experts", (experts, D, width))
    for block in moe.blocks:
        first = (dimensions.vocab_size, block.width) if block.kind == "vocabulary" else (block.width, D)
        yield from (Weight("dense", shape, of_block=True) for shape in (first, (D, block.width)) * block.experts)
    if moe.shared_width:
        yield from _swiglu(D, moe.shared_width)
        if moe.shared_gate:
            yield Weight("dense", (1, D))


def _seen(settings: Settings) -> int:
    """Keys that a token is held against, on average: all of its sequence's, or, where workers share it, those up to the
    end of its chunk (zenray.training.context_parallel)."""
    if settings.context == 1:
        return settings.sequence_tokens
    return (settings.whole_tokens + settings.sequence_tokens // 2) // 2


def _swiglu(hidden: int, width: int) -> Iterator[Weight]:
    yield from (Weight("dense", shape) for shape in ((width, hidden), (width, hidden), (hidden, width)))


def stage_weights(dimensions: ModelDimensions, layers: range) -> Iterator[Weight]:
    """Every parameter of a pipeline stage: the first has the embedding, the last the last norm and the head."""
    first, last = layers.start == 0, layers.stop == dimensions.layers
    vocabulary = Weight("dense", (dimensions.vocab_size, dimensions.hidden_size))
    if first:
        yield vocabulary
    for layer in layers:
        yield from layer_weights(dimensions, layer)
    if last:
        yield Weight("dense", (dimensions.hidden_size,))
        if not (dimensions.tied_embeddings and first):
            yield vocabulary


def held(weight: Weight, layout: TrainingLayout, *, sharded: bool) -> int:
    """How many numbers of a parameter the fullest worker holds. `sharded`: cut by FSDP too, not only by experts."""
    if weight.part != "experts":
        return _cut(weight.shape, 0, layout.of_stage if sharded else 1)
    mine = -(-weight.shape[0] // layout.axes.expert)
    shape = (mine, *weight.shape[1:])
    if not sharded:
        return math.prod(shape)
    replicas = layout.axes.replicas(layout.workers)
    through_rows = mine < replicas and shape[1] % replicas == 0
    return _cut(shape, 1 if through_rows else 0, replicas)


def _cut(shape: tuple[int, ...], axis: int, parts: int) -> int:
    """The largest part, as torch.chunk cuts."""
    return math.prod(shape) // shape[axis] * -(-shape[axis] // parts)


def step_memory(
    dimensions: ModelDimensions,
    layers: range,
    layout: TrainingLayout,
    settings: Settings,
    *,
    passes_in_flight: int = 1,
    teachers: Iterable[Teacher] = (),
) -> StepMemory:
    """Of a worker of the stage that has `layers`. `passes_in_flight`: whose activations a stage keeps at once.

    `teachers`: those that run beside this stage.
    """
    kept, gradients, copies, moments = _state(stage_weights(dimensions, layers), layout, settings)
    teachers = list(teachers)
    always = {
        "weights": kept,
        "moments": moments,
        "buffers": _buffers(dimensions, layers, layout, settings) + _moved(dimensions, layers, settings),
        "teachers": sum(_teacher(teacher, layout, settings) for teacher in teachers),
    }
    saved = [_saved(dimensions, layer, settings) for layer in layers]
    working = [_working(dimensions, layer, settings) for layer in layers]
    before, ends = gradients if settings.accumulates else 0, _ends(dimensions, settings)  # of the passes before
    made = settings.tokens * dimensions.hidden_size * settings.item_bytes  # a pass's hidden states after these layers
    others = (sum(saved) + made) * (passes_in_flight - 1)
    logits = _logits(dimensions, settings, len(teachers)) if layers.stop == dimensions.layers else 0
    whole = others + sum(saved) + ends
    return StepMemory(
        loss=WorkerMemory(gradients=before, activations=whole, logits=logits, **always),
        backward_begins=WorkerMemory(gradients=before, activations=whole + working[-1], logits=0, **always),
        backward_ends=WorkerMemory(
            gradients=gradients + (copies if settings.accumulates else 0),
            activations=others + saved[0] + working[0] + ends,
            logits=0,
            **always,
        ),
    )


def _state(weights: Iterable[Weight], layout: TrainingLayout, settings: Settings) -> tuple[int, int, int, int]:
    """Bytes of weights (and masters), of the masters' gradients, of the network's own, and of moments. Exact."""
    sharded = layout.fully_sharded
    copied = settings.item_bytes if settings.half and not sharded else 0  # beside what is there in float32
    learning = other = moments = 0
    for weight in weights:
        count = held(weight, layout, sharded=sharded)
        if weight.learns_with not in settings.learning:
            other += count
            continue
        learning += count
        in_blocks = settings.moments_in_8_bits and len(weight.shape) > 1 and weight.shape[-1] % BLOCK == 0
        moments += 2 * count + 8 * count // BLOCK if in_blocks else 8 * count
    return learning * (4 + copied) + other * settings.item_bytes, learning * 4, learning * copied, moments


def layer_activations(dimensions: ModelDimensions, layer: int, settings: Settings) -> int:
    """Bytes that one layer keeps for its backward pass where nothing is recomputed.

    Norms keep their input in float32; attention its queries, keys, values, result and mask; SwiGLUs what their
    products need; routers work in float32. On a CPU experts keep their input and gate_up alone (zenray.model.grouped).
    """
    D, q, kv, b = dimensions.hidden_size, dimensions.q_width, dimensions.kv_width, settings.item_bytes
    norm = 4 + b  # the input, in float32, and what the scale multiplies
    token = 2 * norm * D
    token += b * D  # the input of q, k and v
    if dimensions.qk_norm:
        token += norm * (q + kv)
    token += b * (q + 2 * kv * settings.context)  # queries; keys and values of the whole sequence
    token += 2 * b * q + 4 * dimensions.heads  # the result, twice; its sums
    token += b * _seen(settings)  # the mask, as a bias
    token += b * D  # the input of the feed-forward part
    moe = dimensions.moe
    if moe is None or layer in dimensions.dense_layers:
        return settings.tokens * (token + 4 * b * dimensions.ffn_width)
    token += (4 * D if settings.half else 0) + 3 * 4 * moe.experts  # the router's input and scores
    rows, mean_width = _rows(moe)
    per_row = b * (D + (5 if settings.gpu else 2) * mean_width) + 8 * 4
    token += math.ceil(rows * per_row)
    for block in moe.blocks:  # computed for all tokens; its input is the feed-forward part's
        kept = b * (3 * block.width + _seen(settings) * (block.kind == "spatial"))  # as above; a mask of its own
        kept += 4 * block.width // dimensions.head_dim
        token += block.experts * (b * D + (b * block.width if block.kind == "vocabulary" else kept))
    token += 4 * b * moe.shared_width + (b * D if moe.shared_gate else 0)
    return settings.tokens * token


def _rows(moe: MoeDimensions) -> tuple[float, float]:
    """Rows of FFN experts for each token, and their mean width."""
    return moe.top_k * len(moe.widths) / moe.experts, sum(moe.widths) / len(moe.widths)


def _kept_products(dimensions: ModelDimensions, layer: int, settings: Settings) -> int:
    """Bytes that selective recomputation keeps of a layer: its input, and results of products and of attention."""
    D, q, kv, b = dimensions.hidden_size, dimensions.q_width, dimensions.kv_width, settings.item_bytes
    token = b * D + b * (q + 2 * kv) + b * q + 4 * dimensions.heads + b * D
    moe = dimensions.moe
    if moe is None or layer in dimensions.dense_layers:
        return settings.tokens * (token + b * (2 * dimensions.ffn_width + D))
    rows, mean_width = _rows(moe)
    token += 4 * moe.experts + math.ceil(rows * b * (2 * mean_width + 2 * D))
    for block in moe.blocks:
        kept = 0 if block.kind == "vocabulary" else 2 * b * block.width + 4 * block.width // dimensions.head_dim
        token += block.experts * (b * D + kept)
    token += b * (2 * moe.shared_width + D) if moe.shared_width else 0
    return settings.tokens * token


def _saved(dimensions: ModelDimensions, layer: int, settings: Settings) -> int:
    """Bytes that one layer keeps from its forward to its backward pass."""
    if settings.recomputed == "none":
        return layer_activations(dimensions, layer, settings)
    if settings.recomputed == "selective":
        return _kept_products(dimensions, layer, settings)
    return settings.tokens * dimensions.hidden_size * settings.item_bytes


def _working(dimensions: ModelDimensions, layer: int, settings: Settings) -> int:
    """Bytes on top of what is kept while the backward pass is in a layer: what it recomputes, and two gradients."""
    moe = dimensions.moe
    if moe is None or layer in dimensions.dense_layers:
        widest = 2 * dimensions.ffn_width
    else:
        widest = moe.top_k * (2 * max(moe.widths) + dimensions.hidden_size)
    again = 0 if settings.recomputed == "none" else layer_activations(dimensions, layer, settings)
    return again + settings.tokens * settings.item_bytes * widest


def _ends(dimensions: ModelDimensions, settings: Settings) -> int:
    """The last hidden states, their gradient, the last norm's input in float32, and the mask."""
    return settings.tokens * (dimensions.hidden_size * (2 * settings.item_bytes + 4) + settings.whole_tokens)


def _logits(dimensions: ModelDimensions, settings: Settings, teachers: int) -> int:
    """One chunk's logits in float32, their logarithms and gradient; the head's gradient, twice while it is added up."""
    tokens, V = min(CHUNK_TOKENS, settings.tokens), dimensions.vocab_size
    of_head = 2 * V * dimensions.hidden_size * settings.item_bytes if "dense" in settings.learning else 0
    return tokens * V * 4 * (3 + (4 if teachers else 0)) + of_head


def _buffers(dimensions: ModelDimensions, layers: range, layout: TrainingLayout, settings: Settings) -> int:
    """Sharded: two layers gathered, one's gradients on their way, the head whole. Else: one bucket of gradients."""
    if layout.of_stage == 1:
        return 0
    b = settings.item_bytes
    if not layout.fully_sharded:
        learning = [w for w in stage_weights(dimensions, layers) if w.learns_with in settings.learning]
        found = [4 * held(weight, layout, sharded=False) for weight in learning]
        return min(sum(found), BUCKET_BYTES + max(found, default=0))
    of_layer = [_gathered(layer_weights(dimensions, layer), layout) for layer in layers]
    vocabulary = dimensions.vocab_size * dimensions.hidden_size
    ends = (layers.start == 0) + (layers.stop == dimensions.layers)
    root = vocabulary * (min(ends, 1) if dimensions.tied_embeddings else ends)
    flying = (b + 4) * max(max(of_layer), vocabulary if root else 0)
    accumulated = 4 * (sum(of_layer) + root) if settings.accumulates else 0
    return 2 * b * max(of_layer) + b * root + flying + accumulated


def _moved(dimensions: ModelDimensions, layers: range, settings: Settings) -> int:
    """Room for what neighbouring stages send: hidden states and gradients of all passes of a step, as
    torch.distributed.pipelining keeps it."""
    ends = (layers.start == 0) + (layers.stop == dimensions.layers)
    return (2 - ends) * settings.passes * settings.tokens * dimensions.hidden_size * settings.item_bytes


def _gathered(weights: Iterable[Weight], layout: TrainingLayout) -> int:
    """Numbers that a worker has of these while they are used: experts stay cut over their group."""
    return sum(held(weight, layout, sharded=False) for weight in weights)


def _teacher(teacher: Teacher, layout: TrainingLayout, settings: Settings) -> int:
    """Weights of a network that does not learn: whole, or cut where the student's are; then also what is gathered."""
    dimensions = teacher.dimensions
    every = range(dimensions.layers)
    b, sharded = settings.item_bytes, layout.fully_sharded and layout.of_stage > 1 and not teacher.is_whole
    alone = layout if sharded else TrainingLayout()
    kept = sum(held(weight, alone, sharded=sharded) for weight in stage_weights(dimensions, every))
    gathered = 0
    if sharded:
        largest = max(_gathered(layer_weights(dimensions, layer), layout) for layer in every)
        gathered = 2 * largest + dimensions.vocab_size * dimensions.hidden_size
    working = max(_working(dimensions, layer, replace(settings, recomputed="none")) for layer in every)
    return b * (kept + gathered) + working + _ends(dimensions, settings)
