"""The sections of what is measured, each a table of docs/quantization.md or a panel of its picture."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from laboratory import KERNELS, Laboratory, Policy, mixed, serve  # pyrefly: ignore[missing-import]
from outliers import WATCHED, Inputs  # pyrefly: ignore[missing-import]
from rounding import RoundedCache, Rounding, Simulated, smoothed  # pyrefly: ignore[missing-import]

from dcjax.models.parameters import parameters
from dcjax.reporting.progress import Progress
from dcjax.serving.formats import Format, formats
from dcjax.tools.probe.gaps import by_layer
from dcjax.types import Params

PARTS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "embedding": ("embedding",),
    "head": ("head",),
}
IN_PARTS: dict[str, Format] = {
    "int8": formats["int8"],
    "w8a8": formats["w8a8"],
    "w8a8, weights alone": formats["w8a8"].weight_only,
    "w8a8, activations alone": Simulated(None, Rounding(8)),
    "fp8": formats["fp8"],
    "int4": formats["int4"],
}
BY_LAYER, TOGETHER = ("w8a8", "int8"), 5
"""The formats that are looked at by layer, and how many layers are quantised together."""

ALTERNATIVES: dict[str, Format] = {
    "int8 (groups of 32)": formats["int8"],
    "groups of 64": Simulated(Rounding(8, 64)),
    "groups of 128": Simulated(Rounding(8, 128)),
    "groups of 32, least squares": Simulated(Rounding(8, 32, least_squares=True)),
    "int8_channel": formats["int8_channel"],
    "per channel, least squares": Simulated(Rounding(8, least_squares=True)),
    "per channel, rotated": Simulated(Rounding(8, block=512)),
    "int4 (groups of 32)": formats["int4"],
    "int4, groups of 128": Simulated(Rounding(4, 128)),
    "int4, least squares": Simulated(Rounding(4, 32, least_squares=True)),
    "int4, rotated": Simulated(Rounding(4, 32, block=512)),
    "int4, asymmetric": Simulated(Rounding(4, 32, asymmetric=True)),
    "int4, asymmetric, groups of 128": Simulated(Rounding(4, 128, asymmetric=True)),
    "w8a8": formats["w8a8"],
    "w8a8, activations in groups of 128": Simulated(Rounding(8), Rounding(8, 128)),
    "w8a8, activations in groups of 64": Simulated(Rounding(8), Rounding(8, 64)),
    "w8a8, both in groups of 32": Simulated(Rounding(8, 32), Rounding(8, 32)),
    "w8a8, rotated in blocks of 64": Simulated(Rounding(8, block=64), Rounding(8, block=64)),
    "w8a8_rotated (blocks of up to 512)": formats["w8a8_rotated"],
    "w8a8, weights in groups of 32, activations rotated": Simulated(Rounding(8, 32), Rounding(8, block=512)),
}
SMOOTHED, KEPT = "w8a8, SmoothQuant", ("w8a8", "w8a8_rotated", "int8", "int4")
"""An alternative of other masters, and the formats that are measured with tables kept in bfloat16 too."""


def measured(title: str, cases: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """The result of each case, with progress."""
    found = {}
    with Progress(len(cases), initial=0, description=title) as progress:
        for number, (name, case) in enumerate(cases.items(), 1):
            found[name] = case()
            progress.update(number, case=name)
    return found


def of_formats(lab: Laboratory) -> dict[str, Any]:
    """Each of the library's formats as a user names it."""

    def case(format: Format) -> dict[str, Any]:
        policy = serve(lab.config, lab.params, format)
        own = {"bytes": lab.share_of_bytes(format), "kv_cache": format.own_kv_cache}
        return own | lab.gap(policy, format, kv_cache="auto")

    return measured("formats", {name: partial(case, format) for name, format in formats.items()})


def of_parts(lab: Laboratory) -> dict[str, Any]:
    """By format and part: that part alone, or all of them."""
    wide, everywhere, found = serve(lab.config, lab.params, formats["bf16"]), range(lab.config.num_layers), {}
    for name, format in IN_PARTS.items():
        narrow = serve(lab.config, lab.params, format)

        def case(names: Collection[str], narrow: Policy = narrow) -> dict[str, float]:
            return lab.gap(mixed(wide, narrow, set(names), everywhere), formats["bf16"])

        parts = PARTS | {"all": tuple(part for names in PARTS.values() for part in names)}
        found[name] = measured(f"parts of {name}:", {part: partial(case, names) for part, names in parts.items()})
    return found


def of_caches(lab: Laboratory) -> dict[str, Any]:
    """Caches of a model in bfloat16."""
    format = formats["bf16"]
    policy, gap_of = serve(lab.config, lab.params, format), lab.gap
    per_token, rotated = Rounding(8), Rounding(8, block=512)
    cases = {name: partial(gap_of, policy, format, kv_cache=name) for name in ("int8", "fp8")}
    rounded = {
        "int8, keys not rotated": RoundedCache(per_token, per_token),
        "int8, keys before RoPE": RoundedCache(per_token, per_token, before_rope=lab.config),
        "int8 keys alone": RoundedCache(keys=rotated),
        "int8 values alone": RoundedCache(values=per_token),
    }
    return measured(
        "caches", cases | {name: partial(gap_of, policy, format, attention=how) for name, how in rounded.items()}
    )


def of_layers(lab: Laboratory) -> dict[str, Any]:
    """By format: layers quantised alone, and ‖x − r‖ / ‖r‖ of the residual stream where all are, r in float32."""
    reference = _residuals(lab, formats["float32"], "float32")
    wide, found = serve(lab.config, lab.params, formats["bf16"]), {}
    for name in BY_LAYER:
        narrow, depth = serve(lab.config, lab.params, formats[name]), lab.config.num_layers

        def case(first: int, narrow: Policy = narrow) -> dict[str, float]:
            policy = mixed(wide, narrow, KERNELS, range(first, first + TOGETHER))
            return {"first": first} | lab.gap(policy, formats["bf16"])

        cases = {str(first): partial(case, first) for first in range(0, depth, TOGETHER)}
        found[name] = list(measured(f"layers of {name}:", cases).values())
    residuals = {name: _residuals(lab, formats[name]) for name in ("bf16", *BY_LAYER)}
    errors = {name: by_layer(x, reference, lab.text.mask) for name, x in residuals.items()}
    return {"alone": found, "residuals": {name: [row["relative_error"] for row in of] for name, of in errors.items()}}


def _residuals(lab: Laboratory, format: Format, kv_cache: str = "bf16") -> Float[np.ndarray, "B T L E"]:
    found = lab.scores(serve(lab.config, lab.params, format), format, kv_cache).residuals
    return np.moveaxis(np.asarray(found.astype(jnp.float32)), 0, 2)


def of_alternatives(lab: Laboratory, entered: Mapping[str, Sequence[Inputs]]) -> dict[str, Any]:
    """What engines do besides, with a bfloat16 cache."""
    largest = {name: jnp.stack([inputs.largest for inputs in entered[name]]) for name in WATCHED}
    tables = [p.name for p in parameters(lab.config) if p.role == "table"]

    def case(format: Format, keep: Sequence[str] = (), params: Params = lab.params) -> dict[str, float]:
        policy = serve(lab.config, params, format, keep)
        return {"bytes": lab.share_of_bytes(format, keep)} | lab.gap(policy, format)

    cases = {name: partial(case, format) for name, format in ALTERNATIVES.items()}
    cases[SMOOTHED] = lambda: case(formats["w8a8"], params=smoothed(lab.config, lab.params, largest))
    cases |= {f"{name}, tables in bf16": partial(case, formats[name], tables) for name in KEPT}
    return measured("alternatives", cases)
