"""`Qwen3Engine`: a JetStream engine that samples, and returns each token's log-prob and weights version."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from jetstream.engine import tokenizer_pb2

from dcjax.arguments import as_integers
from dcjax.models import ModelConfig
from dcjax.models.cache import Caches, stack_layers
from dcjax.models.layers import round_up
from dcjax.serving import sync
from dcjax.serving.decoder import NO_EXCESS_PRECISION, Decoder, DecodeState, Prefix, Requests
from dcjax.serving.formats import Format, KVCacheName, cache_dtype, serving_format
from dcjax.serving.formats.served import check_served
from dcjax.serving.jetstream import engine_api
from dcjax.serving.mismatch import NO_MISMATCH, MismatchConfig
from dcjax.serving.parallel import COPIES, EVERYWHERE, SHARED_CACHE, named, serving_mesh
from dcjax.serving.sampling import SamplingParams
from dcjax.serving.sync import Conversion, ServingParams, abstract_serving, make_sync, served_shardings
from dcjax.sharding.mesh import MeshConfig, make_mesh, memory_of
from dcjax.sharding.rules import with_shardings
from dcjax.types import Array, Params

_prefill = jax.jit(Decoder.prefill, static_argnums=0, compiler_options=NO_EXCESS_PRECISION)


@flax.struct.dataclass
class SampledTokens(engine_api.ResultTokens):
    """JetStream's result, and what a trainer needs in addition: log-probs and weights versions, both [slots, K]."""

    log_prob: Any = None
    version: Any = None

    def copy_to_host_async(self) -> None:
        """Starts the copies of all arrays."""
        for array in (self.data, self.log_prob, self.version):
            if isinstance(array, jax.Array):
                array.copy_to_host_async()

    def convert_to_numpy(self) -> SampledTokens:
        """The same on the host."""
        data, log_prob, version = jax.device_get((self.data, self.log_prob, self.version))
        return dataclasses.replace(self, data=data, log_prob=log_prob, version=version)

    @property
    def tokens(self):
        """int32 [slots, K]; meaningless where not `valid`."""
        return self.data[:, slice(*self.tokens_idx)]

    @property
    def valid(self):
        """int32 [slots, K]: 1 where a token was sampled."""
        return self.data[:, slice(*self.valid_idx)]


DEEP = 8
"""The number of layers from which on they are looped over, where that costs nothing at run time."""

MOST_TOP_LOGPROBS = 20
"""Most probable tokens that clients of a server can ask for."""

NARROWEST_PREFILL = 16
"""Tokens that a prompt is padded to at least where it is prefilled alone."""


@jax.jit
def _stacked(served: ServingParams) -> ServingParams:
    return dataclasses.replace(served, weights={**served.weights, "layers": stack_layers(served.weights["layers"])})


def _abstract_stacked(served: ServingParams) -> ServingParams:
    """Shapes, dtypes and shardings of what `_stacked` makes, which is compiled for that."""
    return with_shardings(jax.eval_shape(_stacked, served), _stacked.lower(served).compile().output_shardings)


def _loops(config: ModelConfig, format: Format, mesh: jax.sharding.Mesh) -> bool:
    """Whether decoding loops over layers, so that a program's size does not grow with their number.

    Each unrolled layer takes XLA 0.2 s to compile on a CPU. There int8 is as fast either way. Other formats take 1.2
    to 6 times as long in a loop, since conversions of weights leave the loop over tokens only where layers are
    unrolled; experts take a fifth longer (`python benchmarks/depth.py`). On TPUs and GPUs caches are written in place
    only where layers are unrolled.
    """
    return _can_loop(config, mesh) and config.num_layers >= DEEP and format.fast_when_looped


def _can_loop(config: ModelConfig, mesh: jax.sharding.Mesh) -> bool:
    on_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return on_cpu and not config.num_experts


class _Programs(NamedTuple):
    """The programs that serve one request at a time; all states have the same shardings, so each compiles once."""

    empty: Any
    start: Any
    generate: Any


@cache
def _programs(decoder: Decoder) -> _Programs:
    places = decoder.state_places
    return _Programs(
        # compiled, so that each leaf is a buffer of its own and the state can be donated
        empty=jax.jit(Decoder.empty, static_argnums=(0, 1), out_shardings=places),
        start=jax.jit(_start, static_argnums=0, donate_argnums=1, out_shardings=places),
        generate=jax.jit(
            _generate,
            static_argnums=(0, 3),
            donate_argnums=2,
            compiler_options=NO_EXCESS_PRECISION,
            out_shardings=(places, None),
        ),
    )


def _start(decoder: Decoder, state: DecodeState, slot, prefix: Prefix, row, request: Requests) -> DecodeState:
    slots = jnp.arange(len(state.active))
    requests = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(slots), *leaf.shape[1:])), request)
    return decoder.start(state, slots == slot, prefix, jnp.full(len(slots), row), requests)


def _generate(
    decoder: Decoder, params: ServingParams, state: DecodeState, steps: int
) -> tuple[DecodeState, SampledTokens]:
    state, emitted = decoder.steps(params, state, steps)
    valid = emitted.valid.T
    result = SampledTokens(
        data=jnp.concatenate([emitted.tokens.T, valid.astype(jnp.int32), state.generated[:, None]], axis=1),
        tokens_idx=(0, steps),
        valid_idx=(steps, 2 * steps),
        length_idx=(2 * steps, 2 * steps + 1),
        samples_per_slot=1,
        log_prob=jnp.where(valid, emitted.logps.T, 0.0),
        version=jnp.where(valid, params.version, -1),
    )
    return state, result


class Qwen3Engine(engine_api.Engine):
    """Prefills once for each prompt, inserts once for each sample, and generates in all slots.

    `rollout.sample_responses` runs whole batches of requests on it in compiled loops; JetStream's own interface takes
    one at a time.

    Args:
      config: the architecture.
      format: the serving format: a name in `serving.formats.formats`, or a format of one's own.
      kv_cache: the dtype that keys and values are stored in; auto is the format's own.
      keep: names of weights that stay in the activations' dtype, as `sync.make_sync` takes them.
      slots: how many samples are decoded at once.
      max_prompt_length: longest prompt (tokens).
      max_response_length: longest response (tokens, the end token included).
      end_tokens: ids that end a response unless a request names others; themselves sampled, scored and returned.
      steps_per_call: tokens that are decoded in each slot before ended samples are replaced.
      prefill_tokens: the most tokens in one pass of the prefill: several prompts, or a piece of a long one.
      prompts: how many prompts are held beside the slots while these decode, for which there must be memory.
      max_candidates: largest top_k of a request; the tokens that it keeps are recorded. 0 records none, for any top_k.
      max_stop_tokens: how many ids a request may name; if there are more end tokens, the next power of two.
      records_experts: whether the choices of an MoE's routers are recorded.
      records_head: how many of the most probable tokens are recorded with their log-probs, beside each sampled one.
      mismatch: mismatch to add to the engine's own numerics; its staleness is up to the trainer.
      mesh: the mesh that serves, as `parallel.serving_mesh` makes it; None is the first device.
      training_mesh: the mesh of the masters that `sync` takes; None is the first device.
      memory: bytes that each device has for weights and cache; None is what the device, or on CPU the machine, has.

    Raises:
      ValueError: the format is unknown, or the model or the hardware cannot serve it; a setting is out of range; or the
        cache does not fit in memory. Methods raise it for prompts and requests that do not fit, and for prefilling on
        top of an existing prefix.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        format: str | Format,
        kv_cache: KVCacheName = "auto",
        keep: Sequence[str] = (),
        slots: int,
        max_prompt_length: int,
        max_response_length: int,
        end_tokens: Sequence[int],
        steps_per_call: int = 1,
        prefill_tokens: int = 4096,
        prompts: int = 1,
        max_candidates: int = 0,
        max_stop_tokens: int = 4,
        records_experts: bool = False,
        records_head: int = 0,
        mismatch: MismatchConfig = NO_MISMATCH,
        mesh: jax.sharding.Mesh | None = None,
        training_mesh: jax.sharding.Mesh | None = None,
        memory: int | None = None,
    ):
        sizes = {"slots": slots, "steps_per_call": steps_per_call, "prefill_tokens": prefill_tokens, "prompts": prompts}
        for name, size in sizes.items():
            _require_within(name, [size], 1)
        for name, count in {"max_candidates": max_candidates, "records_head": records_head}.items():
            _require_within(name, [count], 0, config.vocab_size)
        if mismatch.routing_flips and config.num_experts <= config.num_experts_per_tok:
            raise ValueError(
                f"mismatch.routing_flips is {mismatch.routing_flips}; it needs a model with experts that a token "
                f"leaves out, and this one has {config.num_experts}"
            )
        if records_experts and not config.num_experts:
            raise ValueError("records_experts is True; it needs a model with experts, and this one has none")
        self._keep = tuple(keep)
        self.config, self.format = config, serving_format(format)
        self.kv_cache = cache_dtype(self.format, kv_cache)
        self._mesh = serving_mesh(make_mesh(MeshConfig())) if mesh is None else mesh
        check_served(config, self.format, self.kv_cache, self._mesh.devices.flat[0].platform, keep)
        self.slots, self.steps_per_call, self.end_tokens = slots, steps_per_call, list(end_tokens)
        self.decoder = Decoder(
            config=config,
            format=self.format,
            kv_cache=self.kv_cache,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            max_candidates=max_candidates,
            # a power of two, so that models with similar numbers of end tokens share programs
            max_stop_tokens=max(max_stop_tokens, 1 << (len(end_tokens) - 1).bit_length()),
            records_experts=records_experts,
            prefill_tokens=prefill_tokens,
            # decoding does not depend on what is done to weights
            mismatch=dataclasses.replace(mismatch, weight_noise=0.0, rounded_masters=False, staleness=0),
            mesh=self._mesh,
            head=records_head,
            loops=_loops(config, self.format, self._mesh),
        )
        if slots % (copies := self._mesh.shape[COPIES]):
            raise ValueError(f"slots is {slots}; it must be a multiple of the {copies} copies of the model")
        # how many samples were started without a key; that number becomes the next one's key
        self._unkeyed = 0
        self._sync = make_sync(
            config,
            self.format,
            self._mesh,
            training_mesh,
            keep=keep,
            weight_noise=mismatch.weight_noise,
            rounded_masters=mismatch.rounded_masters,
        )
        self._require_memory(memory_of(self._mesh.devices.flat[0]) if memory is None else memory, prompts, keep)

    # --- JetStream's interface ---

    def load_params(self, params, version: int = 0) -> ServingParams:
        """Serving params from the trainer's float32 masters: `sync` under JetStream's name."""
        return self.sync(params, version)

    def prefill(self, *, params: ServingParams, existing_prefix=None, padded_tokens, true_length: int) -> Prefix:
        """Prefills one prompt, int32 [L] padded on the right, into a Prefix of one row."""
        if existing_prefix is not None:
            raise ValueError("prefilling on top of an existing prefix is not supported; pass the whole prompt")
        length = int(as_integers("true_length", true_length))
        _require_within("true_length", [length], 1, len(padded_tokens))
        return self.prefill_many(params, [np.asarray(padded_tokens)[:length].tolist()])

    def insert(
        self, prefix: Prefix, decode_state: DecodeState, slot: int, request: Requests | None = None, row: int = 0
    ) -> DecodeState:
        """Starts a sample of a row of `prefix` in `slot`; `decode_state` is donated.

        `request` is a single one from `make_requests`; by default it has temperature 1 and a key of its own.
        """
        _require_within("slot", [slot], 0, self.slots - 1)
        if request is None:
            request = self.make_requests([[0, self._unkeyed]])
            self._unkeyed += 1
        return _programs(self.decoder).start(self.decoder, decode_state, slot, prefix, row, request)

    def generate(self, params: ServingParams, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Decodes `steps_per_call` tokens in every slot that is active; `decode_state` is donated."""
        return _programs(self.decoder).generate(self.decoder, params, decode_state, self.steps_per_call)

    def init_decode_state(self) -> DecodeState:
        """A state in which all slots are empty."""
        return _programs(self.decoder).empty(self.decoder, self.slots)

    def get_prefix_destination_sharding(self) -> Prefix:
        """The shardings of a Prefix: heads are on the devices that attend with them, in every copy of the model."""
        caches: Any = named(self._mesh, SHARED_CACHE)
        everywhere: Any = named(self._mesh, EVERYWHERE)
        return Prefix(caches, everywhere, everywhere, everywhere)

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:  # pyrefly: ignore[missing-attribute]
        """Empty parameters, without a vocabulary file: the rollout path never detokenises in the engine."""
        return tokenizer_pb2.TokenizerParameters()  # pyrefly: ignore[missing-attribute]

    @property
    def max_concurrent_decodes(self) -> int:
        return self.slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self.max_prompt_length

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        return None

    # --- beyond that interface ---

    def sync(self, params: Params, version: int | Int[Array, ""]) -> ServingParams:
        """Serving params from the trainer's float32 masters, by `make_sync`, for this engine's programs."""
        served = self._sync(params, version)
        return _stacked(served) if self.decoder.loops else served

    @property
    def conversion(self) -> Conversion:
        """What `sync` makes of each parameter."""
        return self._sync.conversion

    @property
    def max_prompt_length(self) -> int:
        """Longest prompt (tokens)."""
        return self.decoder.max_prompt_length

    @property
    def max_response_length(self) -> int:
        """Longest response (tokens, the end token included)."""
        return self.decoder.max_response_length

    def for_one_pass(self, params: ServingParams) -> tuple[Decoder, ServingParams]:
        """What reads whole sequences in one pass: looped where it can be, which compiles sooner and runs once.

        Abstract params give abstract ones.
        """
        if self.decoder.loops or not _can_loop(self.decoder.config, self._mesh):
            return self.decoder, params
        stacked = _abstract_stacked if isinstance(params.version, jax.ShapeDtypeStruct) else _stacked
        return dataclasses.replace(self.decoder, loops=True), stacked(params)

    @property
    def most_top_logprobs(self) -> int:
        """Of how many of the most probable tokens servers know log-probs, whatever clients ask for."""
        return min(MOST_TOP_LOGPROBS, self.config.vocab_size)

    def head_shardings(self, training: jax.sharding.Mesh) -> Any:
        """Where the parts of the output head, as it is served, lie on the mesh that trains: beside their master's."""
        return sync.head_shardings(self.config, self.format, training, self._keep)

    def slots_for(self, samples: int) -> int:
        """How many slots decode this many samples: no more than needed, and equally many on each copy of the model."""
        return min(self.slots, round_up(samples, self._mesh.shape[COPIES]))

    def prefill_many(self, params: ServingParams, prompts: Sequence[Sequence[int]], width: int | None = None) -> Prefix:
        """Prefills P prompts in one call, one row each, padded to `width` tokens or to the longest possible."""
        tokens, lengths = self.padded(prompts)
        return _prefill(self.decoder, params, tokens[:, :width], lengths)

    def width_of(self, prompt: Sequence[int]) -> int:
        """The width to prefill a prompt by where it comes alone: a power of two, so that few programs serve all."""
        return min(max(1 << (len(prompt) - 1).bit_length(), NARROWEST_PREFILL), self.max_prompt_length)

    def padded(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts padded on the right, int32 [P, longest], and their lengths, int32 [P].

        Raises:
          ValueError: there is none, or one is empty, too long, or holds what is no token of the vocabulary.
        """
        _require_within("number of prompts", [len(prompts)], 1)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        _require_within("length of a prompt", lengths, 1, self.max_prompt_length)
        tokens = np.zeros((len(prompts), self.max_prompt_length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = as_integers("a prompt", prompt)
        _require_within("token of a prompt", tokens, 0, self.config.vocab_size - 1)
        return tokens, lengths

    def abstract_params(self) -> ServingParams:
        """Shapes, dtypes and shardings of what `sync` makes, where layers are not looped over."""
        served = abstract_serving(self.config, self.format, self._keep)
        return with_shardings(served, served_shardings(self.config, self.format, self._mesh, self._keep))

    def abstract_prompts(self, prompts: int) -> Caches:
        """Shapes, dtypes and shardings of the caches that the prefill of a number of prompts leaves."""
        held = jax.eval_shape(partial(self.decoder.prompt_caches, prompts))
        return with_shardings(held, jax.tree.map(lambda _: named(self._mesh, SHARED_CACHE), held))

    def lowered_sync(self, masters: Params) -> Iterator[tuple[str, Callable[[], Any], int]]:
        """As `Sync.lowered`."""
        return self._sync.lowered(masters)

    def lower_prefill(self, params: ServingParams, prompts: int) -> Any:
        """`prefill_many` of a number of prompts, lowered for abstract params."""
        tokens, lengths = np.zeros((prompts, self.max_prompt_length), np.int32), np.zeros(prompts, np.int32)
        return _prefill.lower(self.decoder, params, tokens, lengths)

    def lower_generate(self, params: ServingParams) -> Any:
        """`generate`, lowered for abstract params."""
        state = jax.eval_shape(partial(self.decoder.empty, self.slots))
        state = with_shardings(state, self.decoder.state_shardings(state))
        return _programs(self.decoder).generate.lower(self.decoder, params, state, self.steps_per_call)

    def compile_sync(self, masters: Params) -> ServingParams:
        """Compiles `sync` for abstract masters; returns abstract serving params."""
        self._sync.compile(masters)
        served = self.abstract_params()
        return _abstract_stacked(served) if self.decoder.loops else served

    def compile_prefill(self, params: ServingParams, prompts: int) -> Prefix:
        """Compiles `prefill_many` for a number of prompts and abstract params; returns an abstract prefix."""
        tokens, lengths = np.zeros((prompts, self.max_prompt_length), np.int32), np.zeros(prompts, np.int32)
        compiled = self.lower_prefill(params, prompts).compile()
        shapes = jax.eval_shape(self.decoder.prefill, params, tokens, lengths)
        return with_shardings(shapes, compiled.output_shardings)

    def rehearse(self, params: ServingParams) -> None:
        """Runs the programs that serve one request at a time once, so that none is compiled while a request waits."""
        state, request, length = self.init_decode_state(), self.make_requests([[0, 0]]), 0
        while length < self.max_prompt_length:
            length = self.width_of([0] * (length + 1))
            state = self.insert(self.prefill_many(params, [[0] * length], length), state, 0, request)
        jax.block_until_ready(self.generate(params, state))

    def make_requests(
        self,
        keys,
        *,
        limits: Int[Array, "N"] | int | None = None,
        temperatures: Float[Array, "N"] | float = 1.0,
        top_ks: Int[Array, "N"] | int = 0,
        top_ps: Float[Array, "N"] | float = 1.0,
        stop_tokens: Int[Array, "N M"] | Sequence[int] | None = None,
    ) -> Requests:
        """Requests for N samples with keys [N, 2], on the host; a single value applies to all samples.

        If None, `limits` are the longest possible and `stop_tokens` the engine's end tokens. Rows of stop tokens may be
        padded with -1.
        """
        keys = np.asarray(keys, np.uint32)

        def column(name: str, values, dtype, low, high=math.inf):
            values = as_integers(name, values) if np.issubdtype(dtype, np.integer) else values
            values = np.broadcast_to(np.asarray(values, dtype), len(keys))
            _require_within(name, values, low, high)
            return values

        stop_tokens = as_integers("stop_tokens", self.end_tokens if stop_tokens is None else stop_tokens)
        stops = np.atleast_2d(np.asarray(stop_tokens, np.int32))
        _require_within("number of stop tokens", [stops.shape[1]], 1, self.decoder.max_stop_tokens)
        stops = np.pad(stops, ((0, 0), (0, self.decoder.max_stop_tokens - stops.shape[1])), constant_values=-1)
        limit = self.max_response_length
        drawn = SamplingParams(
            temperatures=column("temperature", temperatures, np.float32, 0),
            top_ks=column("top_k", top_ks, np.int32, 0, self.decoder.max_candidates or self.config.vocab_size),
            top_ps=column("top_p", top_ps, np.float32, float(np.finfo(np.float32).tiny), 1),
        )
        if self.decoder.max_candidates and (unbounded := (drawn.top_ks == 0) & (drawn.top_ps < 1)).any():
            raise ValueError(
                f"top_p is {drawn.top_ps[unbounded][0]:g} without top_k; this engine records the candidates of "
                f"truncated distributions, so top_k must be 1 to {self.decoder.max_candidates}"
            )
        return Requests(
            limits=column("limit of a response", limit if limits is None else limits, np.int32, 1, limit),
            sampling=drawn,
            stop_tokens=np.broadcast_to(stops, (len(keys), stops.shape[1])),
            keys=keys,
        )

    def _require_memory(self, available: int, prompts: int, keep: Sequence[str]) -> None:
        weights = abstract_serving(self.config, self.format, keep)
        placed = served_shardings(self.config, self.format, self._mesh, keep)
        copies, within = self._mesh.devices.shape
        held = self.abstract_prompts(prompts)
        of_prompts = _bytes(held, jax.tree.map(lambda leaf: leaf.sharding, held))
        left = available - _bytes(weights, placed) - of_prompts
        one_each = jax.eval_shape(partial(self.decoder.empty, copies))
        of_slot = _bytes(one_each, self.decoder.state_shardings(one_each))
        slots = self.slots // copies
        if slots * of_slot > left:
            capacity = f"{self.max_prompt_length} + {self.max_response_length} tokens"
            where = f" on each of {copies * within} devices" if copies * within > 1 else ""
            raise ValueError(
                f"slots is {self.slots}: a KV cache in {self.kv_cache.name} for {capacity} each takes "
                f"{slots * of_slot / 2**30:.2f} GiB{where}, and {max(left, 0) / 2**30:.2f} of "
                f"{available / 2**30:.2f} GiB are left beside the weights and the caches of {prompts} prompts; "
                f"{max(left // of_slot, 0) * copies} slots would fit"
            )


def _bytes(tree, placed) -> int:
    """Bytes that a tree of arrays takes on one of the devices that share it."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)


def _require_within(name: str, values: Any, low: int | float, high: int | float = math.inf) -> None:
    for value in (np.min(values), np.max(values)):
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"{name} is {value}; this engine takes {bounds}")
