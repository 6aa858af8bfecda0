"""A run's programs on devices that nothing can be compiled for: what each holds, does and sends, by closed formulas.

Everything follows from the `Config` and the sizes of its meshes, and is of one device. Letters: E is the width of the
residual stream, V the vocabulary, N the devices; a matrix is K × N. A collective's bytes are those that arrive at a
device: of an all-gather or a reduce-scatter among g devices (g - 1) / g of the whole, and of an all-reduce twice that.
Norms, biases and what is done element by element are free, as if all were fused into the products beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from dcjax.models.attention import choose_cached
from dcjax.models.cache import LARGEST
from dcjax.models.config import DTYPES, ModelConfig
from dcjax.models.parallel.experts import ROOM
from dcjax.models.parallel.forward import check_model
from dcjax.models.parameters import Parameter, abstract_params, parameter_named, parameters
from dcjax.recipe import build
from dcjax.recipe.config import Config
from dcjax.serving.formats import Format, cache_dtype, serving_format
from dcjax.serving.parallel import COPIES, WITHIN
from dcjax.serving.sync import served_shardings, stored_parameters
from dcjax.sharding.rules import RULES, SERVING_RULES, Rules, mesh_axes, partition_spec
from dcjax.tools.plan.hlo import Collective, Cost
from dcjax.tools.plan.programs import Planned, attended, cached, microbatches
from dcjax.types import Bins

FLOAT32 = 4
"""Bytes of a gradient, a logit, and a score of attention."""


@dataclass(frozen=True)
class Sizes:
    """A run, and how devices share it."""

    config: Config
    """From `programs.for_platform`."""
    platform: str
    """By JAX's name."""
    devices: int
    """That train and that serve, together."""
    mean_response: float
    """Tokens of a response."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.config.model

    @property
    def format(self) -> Format:
        """That the engine serves in."""
        return serving_format(self.config.serving.format)

    @property
    def training(self) -> dict[str, int]:
        """Devices along each axis of the training mesh."""
        return asdict(self.config.mesh)

    @property
    def serving_devices(self) -> int:
        """Devices that the engine runs on."""
        return self.config.serving.devices or self.devices

    @property
    def serving(self) -> dict[str, int]:
        """Devices along each axis of the serving mesh."""
        tensor = self.config.serving.tensor
        return {COPIES: self.serving_devices // tensor, WITHIN: tensor}

    @property
    def compute(self) -> int:
        """Bytes of an activation in training, and of a weight in a product."""
        return DTYPES[self.model.precision.compute].itemsize

    @cached_property
    def bins(self) -> Bins:
        """What a microbatch of one share has room for."""
        return self.config.packing(self.platform).bins

    @property
    def columns(self) -> float:
        """Of a microbatch, that a device computes: a share's over `mesh.context`."""
        return self.bins.columns / self.training["context"]

    @cached_property
    def microbatches(self) -> float:
        """That a device computes in an iteration."""
        return microbatches(self.config, self.mean_response) * self.config.optimizer.updates

    @cached_property
    def passes_without_gradients(self) -> int:
        """Forward passes for log-probs alone: of the old policy where updates follow each other or the objective needs
        them first, and of the reference policy."""
        requires, rollout = build.objective_of(self.config).requires, self.config.rollout
        old = self.config.optimizer.updates > 1 or rollout.async_level > 0 or bool(requires.of_iteration)
        return old + requires.reference_logps

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass computes a layer again."""
        return self.model.resolved_remat != "none"


def check(config: Config, devices: int) -> None:
    """Checks that the meshes divide the model and the slots, as what trains and serves would.

    Raises:
      ValueError: they do not.
    """
    run = Sizes(config, "gpu", devices, 1.0)
    check_model(run.model, run.training)
    tensor, slots_ = config.serving.tensor, config.serving.slots
    if run.serving_devices % tensor:
        raise ValueError(f"serving.tensor is {tensor}; it must divide the number of devices, {run.serving_devices}")
    if slots_ % (copies := run.serving[COPIES]):
        raise ValueError(f"slots is {slots_}; it must be a multiple of the {copies} copies of the model")
    names, sizes = zip(*run.serving.items(), strict=True)
    mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
    served_shardings(run.model, run.format, mesh, config.serving.keep)


# --- memory ---


def parts(parameter: Parameter, sizes: Mapping[str, int], rules: Rules = RULES) -> int:
    """Into how many a mesh splits a parameter: the product of its axes' sizes."""
    axes = [axis for axis in partition_spec(PartitionSpec(*parameter.stacked_axes), rules) if axis is not None]
    return math.prod(sizes[axis] for axis in axes)


def params_bytes(run: Sizes) -> float:
    """Σ over parameters of elements / parts × bytes of `precision.parameters`."""
    elements = sum(parameter.size / parts(parameter, run.training) for parameter in parameters(run.model))
    return elements * DTYPES[run.model.precision.parameters].itemsize


def optimiser_bytes(run: Sizes) -> float:
    """Parameters' bytes × copies of them in the state: Adam's two moments, an average, a reference, past parameters."""
    shapes, kept = abstract_params(run.model), build.PastParams.needed_by(run.config)
    moments = jax.eval_shape(build.build_optimizer(run.config).init, shapes)
    return params_bytes(run) * (_bytes(moments) / _bytes(shapes) + kept.reference + kept.history)


def _bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def gradients_bytes(run: Sizes) -> float:
    """Two float32 of each parameter on the device: the sum over microbatches, and its quotient by the denominator."""
    return 2 * FLOAT32 * sum(parameter.size / parts(parameter, run.training) for parameter in parameters(run.model))


def kernels(model: ModelConfig, sparse: bool) -> list[Parameter]:
    """The matrices of a layer with experts, or of one without."""
    layer = model.sparse_layers.index(sparse)
    return [one for one in parameters(model) if layer in (one.layers or ()) and one.role in ("kernel", "router")]


def rows_of(parameter: Parameter, model: ModelConfig) -> int:
    """How often a token meets a matrix: once, or an expert's for each of its choices."""
    return model.num_experts_per_tok if parameter.experts else 1


def width(parameter: Parameter, tensor: int) -> float:
    """K + N of a matrix for one token: E is whole on every device, and heads and MLP are divided by tensor."""
    sizes = zip(parameter.shape, parameter.axes, strict=True)
    return sum(size / (tensor if "tensor" in mesh_axes(axis) else 1) for size, axis in sizes)


def widths(model: ModelConfig, tensor: int) -> float:
    """Σ over all layers of K + N, an expert's for each choice."""
    return sum(
        rows_of(one, model) * width(one, tensor) for sparse in model.sparse_layers for one in kernels(model, sparse)
    )


def cast_bytes(run: Sizes) -> float:
    """The device's parameters in the compute dtype, from which they are gathered; none where they are in it."""
    precision = run.model.precision
    if precision.parameters == precision.compute:
        return 0.0
    return params_bytes(run) * run.compute / DTYPES[precision.parameters].itemsize


def saved_bytes(run: Sizes) -> float:
    """Kept for the backward pass, a device's columns in the compute dtype: layers × columns × (E / tensor, the input of
    a layer; with remat products also Σ N / tensor of its products; with none also all else, about as much again)."""
    model, tensor = run.model, run.training["tensor"]
    of_column = 0.0
    for sparse in model.sparse_layers:
        made = sum(rows_of(one, model) * one.shape[1] for one in kernels(model, sparse))
        of_column += (model.hidden_size + {"full": 0, "products": 1, "none": 2}[model.resolved_remat] * made) / tensor
    return of_column * run.columns * run.compute


def attention_bytes(run: Sizes) -> float:
    """What attention stores of all columns × keys of the widest bins: cuDNN a mask of a byte and a bias in the compute
    dtype; XLA float32 of heads / (tensor × context), scores, weights and the gradients of both; splash nothing."""
    pairs = run.bins.columns * (run.bins.width + run.bins.gathered)
    heads = run.model.num_heads / (run.training["tensor"] * run.training["context"])
    return pairs * {"cudnn": 1 + run.compute, "xla": 4 * FLOAT32 * heads, "splash": 0}[run.model.attention]


def layer_bytes(run: Sizes) -> float:
    """The largest layer's backward pass: columns × Σ (K + N) of its products in the compute dtype, results and for
    each the gradient of what it was made from; what attention stores; and gathered matrices, in the compute dtype and
    float32 for gradients.

    Experts on several devices have room for twice the choices of one in each round.
    """

    def of(sparse: bool) -> float:
        own, room, tensor = kernels(run.model, sparse), min(run.training["expert"], ROOM), run.training["tensor"]
        values = sum(rows_of(one, run.model) * (room if one.experts else 1) * width(one, tensor) for one in own)
        weights = sum(math.prod(one.shape) * (one.experts or 1) / _kept_apart(one, run) for one in own)
        return run.columns * values * run.compute + attention_bytes(run) + weights * (run.compute + FLOAT32)

    return max(map(of, set(run.model.sparse_layers)))


def _kept_apart(parameter: Parameter, run: Sizes) -> float:
    """Parts of a parameter that no gathering joins: all but those of fsdp."""
    fsdp = run.training["fsdp"] if "embed" in parameter.axes else 1
    return parts(parameter, run.training) / fsdp


def head(model: ModelConfig) -> Parameter:
    """The table of the output head."""
    return parameter_named(model, "embed_tokens" if model.tie_embeddings else "lm_head")


def head_chunks(run: Sizes) -> int:
    """In how many chunks of at most `head_chunk` the two halves of a microbatch's columns meet the head."""
    return math.ceil(run.bins.columns / 2 / run.model.head_chunk)


def head_bytes(run: Sizes) -> float:
    """The head's backward pass: 3 × columns of a chunk × V / tensor float32 (logits, exponentials, gradients); V × E /
    tensor of the gathered table, in the head's dtype and float32 for its gradient; and columns × E of the hidden
    states, in the compute dtype and float32 for their gradient."""
    table = head(run.model)
    gathered = table.size / _kept_apart(table, run)
    scored = 3 * FLOAT32 * run.columns / head_chunks(run) * run.model.vocab_size / run.training["tensor"]
    hidden = run.columns * run.model.hidden_size * (run.compute + FLOAT32)
    return scored + gathered * (DTYPES[run.model.precision.head].itemsize + FLOAT32) + hidden


def activations_bytes(run: Sizes) -> float:
    """All temporaries of the train step: gradients + cast parameters + what is saved + the larger of a layer's and the
    head's."""
    return gradients_bytes(run) + cast_bytes(run) + saved_bytes(run) + max(layer_bytes(run), head_bytes(run))


def serving_bytes(run: Sizes, *, tables: bool = True) -> float:
    """Σ over parameters of bytes as stored / parts on the devices of a copy; without tables, of the layers alone."""
    return sum(
        row.bytes / parts(parameter_named(run.model, row.name), run.serving, SERVING_RULES)
        for row in stored_parameters(run.model, run.format, run.config.serving.keep)
        if tables or parameter_named(run.model, row.name).layers is not None
    )


def token_bytes(run: Sizes) -> float:
    """Of one token's keys and values on a device: 2 × layers × heads / tensor × (head_dim × bytes, and 4 of a scale in
    8 bits)."""
    model, stored = run.model, cache_dtype(run.format, run.config.serving.kv_cache)
    vector = model.head_dim * stored.itemsize + (FLOAT32 if stored in LARGEST else 0)
    return 2 * model.num_layers * model.num_kv_heads / run.serving[WITHIN] * vector


def capacity(run: Sizes) -> int:
    """Tokens of a slot."""
    return run.config.rollout.max_prompt_length + run.config.rollout.max_response_length


def slots(run: Sizes) -> float:
    """That a device decodes: all over copies."""
    return run.config.serving.slots / run.serving[COPIES]


def cache_bytes(run: Sizes) -> float:
    """Slots × capacity × a token's."""
    return slots(run) * capacity(run) * token_bytes(run)


def prompts_bytes(run: Sizes) -> float:
    """Prompts × their longest, in whole pieces, × a token's: every copy has all."""
    longest, most = run.config.rollout.max_prompt_length, run.config.serving.prefill_tokens
    return run.config.rollout.prompts * math.ceil(longest / most) * min(longest, most) * token_bytes(run)


def kinds(run: Sizes) -> dict[str, int]:
    """Bytes on a device by kind."""
    return {
        "params": round(params_bytes(run)),
        "optimiser": round(optimiser_bytes(run)),
        "serving weights": round(serving_bytes(run)),
        "KV cache": round(cache_bytes(run)),
        "prompts' caches": round(prompts_bytes(run)),
        "activations": round(activations_bytes(run)),
    }


# --- collectives ---


def members(sizes: Mapping[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """The numbers of the first group of devices along some axes of a mesh that is filled in order."""
    numbers = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    return tuple(numbers[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist())


def collective(
    kind: str, whole: float, sizes: Mapping[str, int], axes: Sequence[str], times: float, op: str
) -> Iterator[Collective]:
    """One of `whole` bytes among the devices along some axes; none where these are one device.

    Arriving are (g - 1) / g of them, and of an all-reduce twice that.
    """
    group = members(sizes, axes)
    if (count := len(group)) > 1 and times:
        arriving = whole * (count - 1) / count * (2 if kind == "all-reduce" else 1)
        yield Collective(kind, arriving, count, group, times, op)


def weights_sent(run: Sizes) -> Iterator[Collective]:
    """Of each microbatch: an all-gather of weights over fsdp in the compute dtype, forward, backward and in each pass
    without gradients; a reduce-scatter of float32 gradients; and their all-reduce over replicas.

    The head's table is gathered, and its gradient summed, in each of its chunks. The embedding's stays in place.
    """
    times, chunks = run.microbatches, head_chunks(run)
    groups: dict[tuple[str, ...], float] = {}
    layers = 0.0
    for one in parameters(run.model):
        owned = mesh_axes_of(one)
        replicas = tuple(axis for axis in ("data", "expert", "context") if axis not in owned)
        groups[replicas] = groups.get(replicas, 0.0) + one.size / parts(one, run.training)
        layers += one.size / _kept_apart(one, run) if one.layers else 0.0
    passes = 2 + run.passes_without_gradients
    table = head(run.model).size / _kept_apart(head(run.model), run)
    of_head = DTYPES[run.model.precision.head].itemsize
    for op, size, bytes_, often in (("layers", layers, run.compute, times), ("head", table, of_head, times * chunks)):
        yield from collective("all-gather", size * bytes_, run.training, ["fsdp"], passes * often, f"weights of {op}")
        yield from collective("reduce-scatter", size * FLOAT32, run.training, ["fsdp"], often, f"gradients of {op}")
    for replicas, size in groups.items():
        yield from collective("all-reduce", size * FLOAT32, run.training, replicas, times, "gradients of replicas")


def mesh_axes_of(parameter: Parameter) -> set[str]:
    """The mesh axes that split a parameter."""
    return {axis for name in parameter.stacked_axes for axis in mesh_axes(name)}


def layer_passes(run: Sizes) -> float:
    """How often a layer is computed in an iteration, a backward pass without its forward one counting as one."""
    return run.microbatches * (2 + run.recomputes + run.passes_without_gradients)


def activations_sent(run: Sizes) -> Iterator[Collective]:
    """Of each layer and pass, forward, again and backward: two all-reduces of columns × E over tensor, and an
    all-gather of what is divided between layers; columns × (2 H + 2 K) × D / tensor of queries, keys, values and
    results in all-to-alls over context; and columns × choices × E in all-to-alls to the experts and back."""
    model, sizes = run.model, run.training
    times = layer_passes(run) * model.num_layers
    stream = run.columns * model.hidden_size * run.compute
    heads = run.columns * 2 * (model.num_heads + model.num_kv_heads) * model.head_dim / sizes["tensor"] * run.compute
    sparse = layer_passes(run) * sum(model.sparse_layers)
    yield from collective("all-reduce", stream, sizes, ["tensor"], 2 * times, "activations")
    yield from collective("all-gather", stream, sizes, ["tensor"], times, "activations")
    yield from collective("all-to-all", heads, sizes, ["context"], times, "heads")
    choices = stream * model.num_experts_per_tok
    yield from collective("all-to-all", choices, sizes, ["expert"], 2 * sparse, "choices of experts")


# --- operations ---


def layers_elements(run: Sizes, tensor: int) -> tuple[float, float]:
    """Σ over layers of K × N / tensor that a token meets, of an expert's for each choice; and of routers, which every
    device has whole."""
    model = run.model
    own = [one for sparse in model.sparse_layers for one in kernels(model, sparse)]
    routers = sum(math.prod(one.shape) for one in own if one.role == "router")
    return sum(rows_of(one, model) * math.prod(one.shape) / tensor for one in own if one.role != "router"), routers


def products(run: Sizes) -> float:
    """How often a microbatch's columns are multiplied by a layer's matrices: forward, again, and twice backward."""
    return 3 + run.recomputes + run.passes_without_gradients


def head_products(run: Sizes) -> float:
    """The same for the head, which is computed again where it is in chunks."""
    return 3 + (head_chunks(run) > 1) + run.passes_without_gradients


def layers_flops(run: Sizes) -> tuple[float, float]:
    """2 × columns × elements × products of a microbatch, by matrices and routers; with remat, what the layer ends with,
    the K × N that nothing in it needs, is not computed again, and with products kept none is."""
    model, tensor = run.model, run.training["tensor"]
    elements, routers = layers_elements(run, tensor)
    last = sum(
        math.prod(one.shape) / tensor
        for sparse in model.sparse_layers
        for one in kernels(model, sparse)
        if one.name == "down_proj"
    )
    again = {"full": elements - last, "products": 0.0, "none": 0.0}[model.resolved_remat]
    return (
        2 * run.columns * (elements * (3 + run.passes_without_gradients) + again),
        2 * run.columns * routers * products(run),
    )


def keys(run: Sizes) -> float:
    """That a column's attention multiplies: those it sees, or under a mask all of its bin and those gathered for it, in
    bins halved as often as a mean response and a prompt allow."""
    # bins are shared where attention computes them whole, under a mask
    if not run.bins.shared:
        return attended(run.config, run.mean_response)
    needed = max(run.mean_response, run.config.rollout.max_prompt_length - 1)
    halved = [run.bins.halved(times) for times in range(run.bins.halvings + 1)]
    narrowest = min((one for one in halved if one.gathered >= needed), key=lambda one: one.width, default=run.bins)
    return narrowest.width + narrowest.gathered


def attention_flops(run: Sizes) -> float:
    """2 × layers × columns of a share × keys × heads × D / (tensor × context) × products of a microbatch: two forward,
    two again, and five backward."""
    model, sizes = run.model, run.training
    width = model.num_heads * model.head_dim / (sizes["tensor"] * sizes["context"])
    counted = 7 + 2 * run.recomputes + 2 * run.passes_without_gradients
    return 2 * counted * model.num_layers * run.bins.columns * keys(run) * width


def head_flops(run: Sizes) -> float:
    """2 × columns × V × E / tensor × products of a microbatch."""
    return 2 * run.columns * head(run.model).size / run.training["tensor"] * head_products(run)


def train_flops(run: Sizes) -> dict[str, float]:
    """Of an iteration, by dtype: routers in float32, the head in its own, all else in the compute dtype."""
    matrices, routers = layers_flops(run)
    counted: dict[str, float] = {}
    for dtype, flops in (
        (_xla_name(DTYPES[run.model.precision.compute]), matrices + attention_flops(run)),
        (_xla_name(DTYPES[run.model.precision.head]), head_flops(run)),
        ("f32", routers),
    ):
        counted[dtype] = counted.get(dtype, 0.0) + flops * run.microbatches
    return {dtype: flops for dtype, flops in counted.items() if flops}


def _xla_name(dtype: jnp.dtype) -> str:
    """As XLA writes it."""
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "s8", "float8_e4m3fn": "f8e4m3fn"}
    return names[dtype.name]


# --- bytes of memory ---


def train_bytes(run: Sizes) -> float:
    """Read and written in an iteration.

    Of a microbatch: columns × Σ (K + N) × products, in the compute dtype; gathered weights twice a pass, once
    to write and once to read; logits twice a product of the head; float32 gradients, gathered twice and on the device
    thrice. Of an update: parameters and optimiser twice, and gradients.
    """
    model, tensor = run.model, run.training["tensor"]
    weights = sum(one.size / _kept_apart(one, run) for one in parameters(model) if one.layers or one == head(model))
    logits = run.columns * model.vocab_size / tensor * FLOAT32
    microbatch = (
        run.columns * widths(model, tensor) * run.compute * products(run)
        + weights * run.compute * 2 * (2 + run.recomputes + run.passes_without_gradients)
        + logits * 2 * head_products(run)
        + weights * FLOAT32 * 2
        + 1.5 * gradients_bytes(run)
    )
    update = 2 * (params_bytes(run) + optimiser_bytes(run)) + gradients_bytes(run) / 2
    return run.microbatches * microbatch + run.config.optimizer.updates * update


# --- programs ---


def train_step(run: Sizes) -> Planned:
    """All updates of an iteration."""
    return _planned(
        "train_step",
        1,
        arguments=params_bytes(run) + optimiser_bytes(run),
        temporaries=activations_bytes(run),
        cost=Cost(train_flops(run), train_bytes(run), [*weights_sent(run), *activations_sent(run)]),
    )


def sync(run: Sizes) -> Planned:
    """Masters to serving weights: each device reads its masters, stores their share, and gathers what else it serves,
    of which it has tensor of serving over the parts that training splits a matrix into; none where others serve."""
    served, axes = serving_bytes(run), ("fsdp", "tensor", "expert")
    group = members(run.training, axes)
    own = 0.0 if run.config.serving.devices else min(run.serving[WITHIN] / len(group), 1.0)
    gathered = Collective("all-gather", served * (1 - own), len(group), group, 1, "serving weights")
    return _planned(
        "sync",
        1,
        arguments=params_bytes(run),
        output=served,
        temporaries=served / run.model.num_layers,
        cost=Cost({}, params_bytes(run) + 2 * served, [gathered] if own < 1 else []),
    )


def served_dtype(run: Sizes) -> str:
    """Of both sides of the engine's products, by XLA's name: 8 bits where activations are quantised too."""
    if not run.format.quantizes_activations:
        return _xla_name(run.format.activations)
    stored = cache_dtype(run.format, run.format.own_kv_cache)
    return _xla_name(stored if stored in LARGEST else run.format.activations)


def prefill(run: Sizes) -> Planned:
    """Every copy computes its share of the prompts, padded to the longest, against a cache of that many keys; and then
    gathers the caches of all. Without the head, as decoding feeds a prompt's last token again."""
    model, copies, tensor = run.model, run.serving[COPIES], run.serving[WITHIN]
    longest, most = run.config.rollout.max_prompt_length, run.config.serving.prefill_tokens
    rows, passes = prefill_rows(run)
    tokens, at_once = rows * passes * longest, rows * min(longest, most)
    elements, routers = layers_elements(run, tensor)
    heads, wide = model.num_heads / tensor, run.format.activations.itemsize
    # scores are written and read twice, once as they are and once as weights
    scores = model.num_layers * tokens * heads * longest * FLOAT32 * 4
    weights = serving_bytes(run, tables=False) * passes * math.ceil(longest / most)
    flops = _added(
        (served_dtype(run), 2 * tokens * elements),
        ("f32", 2 * tokens * routers),
        (_xla_name(run.format.activations), 4 * tokens * model.num_layers * heads * model.head_dim * longest),
    )
    sent = [
        *collective("all-gather", prompts_bytes(run), run.serving, [COPIES], 1, "prompts' caches"),
        *_stream_sent(run, at_once, passes * math.ceil(longest / most)),
    ]
    return _planned(
        "prefill",
        1,
        arguments=serving_bytes(run),
        output=prompts_bytes(run),
        temporaries=at_once * heads * longest * FLOAT32 * 2 + prompts_bytes(run) / copies,
        cost=Cost(flops, weights + tokens * widths(model, tensor) * wide + scores + 2 * prompts_bytes(run), sent),
    )


def prefill_rows(run: Sizes) -> tuple[int, int]:
    """Prompts that a copy prefills in one pass, and passes: as many prompts as `prefill_tokens` allow, or one."""
    longest, copies = run.config.rollout.max_prompt_length, run.serving[COPIES]
    of_copy = math.ceil(run.config.rollout.prompts / copies)
    rows = min(max(run.config.serving.prefill_tokens // longest, 1), of_copy)
    return rows, math.ceil(of_copy / rows)


def decode(run: Sizes) -> Planned:
    """A call of `steps_per_call` tokens in every slot: a step reads all weights but the embedding's, and keys and
    values of what is filled, or where XLA attends of all there is room for; logits are written and read three times."""
    model, tensor, rows = run.model, run.serving[WITHIN], slots(run)
    serving, rollout = run.config.serving, run.config.rollout
    kernel = choose_cached(model.attention, run.platform, run.format.activations)
    seen = capacity(run) if kernel == "xla" else cached(run.config, run.mean_response)
    elements, routers = layers_elements(run, tensor)
    elements += head(model).size / tensor
    heads = model.num_heads * model.head_dim / tensor
    logits = rows * model.vocab_size / tensor * FLOAT32
    flops = _added(
        (served_dtype(run), 2 * rows * elements),
        ("f32", 2 * rows * routers),
        (_xla_name(run.format.activations), 4 * rows * model.num_layers * heads * seen),
    )
    moved = read_weights(run) + rows * seen * token_bytes(run) + 6 * logits
    times = serving.steps_per_call
    return _planned(
        "decode",
        rollout.sequences * run.mean_response / (serving.slots * times),
        arguments=serving_bytes(run) + cache_bytes(run),
        temporaries=3 * logits + (rows * heads / model.head_dim * seen * FLOAT32 * 2 if kernel == "xla" else 0),
        cost=Cost({t: n * times for t, n in flops.items()}, moved * times, list(_stream_sent(run, rows, times))),
    )


def read_weights(run: Sizes) -> float:
    """Bytes of weights that a step of decoding reads: all but an embedding that is no head; of a layer's experts those
    that are chosen, 1 - (1 - k / experts) ** slots of them where choices are even."""
    model, chosen = run.model, 0.0
    if model.num_experts:
        chosen = 1 - (1 - model.num_experts_per_tok / model.num_experts) ** slots(run)
    total = 0.0
    for row in stored_parameters(model, run.format, run.config.serving.keep):
        one = parameter_named(model, row.name)
        if one.layers is not None or one == head(model):
            total += row.bytes / parts(one, run.serving, SERVING_RULES) * (chosen if one.experts else 1)
    return total


def _stream_sent(run: Sizes, rows: float, times: float) -> Iterator[Collective]:
    """Two all-reduces a layer, and one of what the embedding found, of rows × E over the devices of a copy."""
    whole = rows * run.model.hidden_size * run.format.activations.itemsize
    count = (2 * run.model.num_layers + 1) * times
    yield from collective("all-reduce", whole, run.serving, [WITHIN], count, "activations")


def _added(*counted: tuple[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    for dtype, flops in counted:
        if flops:
            total[dtype] = total.get(dtype, 0.0) + flops
    return total


def _planned(
    name: str, runs: float, *, arguments: float, temporaries: float, cost: Cost, output: float = 0.0
) -> Planned:
    return Planned(name, runs, 0.0, round(arguments), round(output), round(temporaries), cost)


def programs(run: Sizes) -> list[Planned]:
    """Of an iteration, in order."""
    return [train_step(run), sync(run), prefill(run), decode(run)]
