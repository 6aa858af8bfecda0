"""A plan as text and as JSON."""

from __future__ import annotations

import json
from typing import Any

from dcjax.tools.plan.chips import GIB, Chip
from dcjax.tools.plan.hlo import Collective
from dcjax.tools.plan.plan import USABLE, Plan, ProgramPlan

BY_HAND = "estimated by hand, not compiled: docs/plan.md says how, and how far such estimates were off"
PARTS = {"compute": "compute", "memory": "its memory", "links": "its links"}


def to_text(plan: Plan, price: float | None = None) -> str:
    """Tables for a terminal; `price` is money for a chip-hour."""
    chip = plan.chip
    devices = f", {chip.devices} devices each" if chip.devices > 1 else ""
    lines = [
        f"{plan.topology}: {plan.chips} chips{devices}; a chip has {chip.peak / 1e12:g} TFLOP/s in bf16, "
        f"{chip.hbm / GIB:.1f} GiB at {chip.bandwidth / 1e9:g} GB/s, {_links(chip)}",
        *([] if plan.compiled else [BY_HAND]),
        "held on a chip: " + ", ".join(f"{kind} {size / GIB:.2f} GiB" for kind, size in plan.kinds.items()),
        "",
        f"{'program':<26}{'runs':>7}{'GiB':>8}{'fits':>6}{'TFLOP':>9}{'HBM GB':>10}{'sent GB':>10}{'at least':>13}"
        f"  {'bound by':<20}" + ("compiled" if plan.compiled else ""),
        *[_line(program, plan.compiled) for program in plan.programs],
    ]
    for program in plan.programs:
        if program.planned.refused:
            lines.append(f"{program.planned.name} does not compile: {program.planned.refused}")
    for program in plan.programs:
        if program.bound.links > 0.2 * program.bound.seconds and program.dominating is not None:
            lines.append(f"{program.planned.name}: most of what is sent is {_described(program.dominating)}")
    return "\n".join([*lines, "", *_reckoned(plan, price)])


def _reckoned(plan: Plan, price: float | None) -> list[str]:
    """What an iteration and the run take, at least."""
    if not plan.fits:
        return ["an iteration is not reckoned, as the run does not fit"]
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.seconds.items())
    cost = "" if price is None else f", {plan.chip_hours * price:,.2f} at {price:g} a chip-hour"
    return [
        f"an iteration with responses of {plan.mean_response:g} tokens, at least: {plan.iteration:.3g} s ({parts})",
        f"at most {plan.tokens / plan.iteration / plan.chips:,.0f} tokens/s a chip; the update at most "
        f"{100 * plan.share_of_peak:.0f}% of the chips' peak (six operations a parameter and token)",
        f"{plan.steps} steps: at least {plan.chip_hours:,.1f} chip-hours{cost}",
    ]


def _links(chip: Chip) -> str:
    rate = f"{chip.link / 1e9:g} GB/s"
    if not chip.node:
        return f"{chip.links} links of {rate}"
    return f"NVLink of {rate} in nodes of {chip.node}, {chip.network / 1e9:g} GB/s from other nodes"


def _line(program: ProgramPlan, compiled: bool) -> str:
    planned, bound = program.planned, program.bound
    held = (planned.peak_bytes + program.resident) / GIB
    flops = sum(planned.cost.flops.values()) / 1e12
    sent = sum(program.collectives.values()) / 1e9
    by = "" if planned.refused else PARTS[bound.by]
    return (
        f"{planned.name:<26}{planned.runs:>7.3g}{held:>8.2f}{'yes' if program.fits else 'NO':>6}{flops:>9.3g}"
        f"{planned.cost.bytes / 1e9:>10.3g}{sent:>10.3g}{bound.seconds * 1e3:>10.3g} ms  {by:<20}"
        + (f"{planned.compile_seconds:.0f} s" if compiled else "")
    )


def _described(one: Collective) -> str:
    where = f", of {one.op.rsplit('/', 3)[-1]}" if one.op else ""
    return f"{one.kind} among {one.group}, {one.bytes / 1e6:.3g} MB {one.times:g} times{where}"


def to_json(plan: Plan, price: float | None = None) -> str:
    """One line: bytes and seconds of one chip; what an iteration takes is null where the run does not fit."""
    reckoned = (
        {
            "iteration_seconds": plan.seconds | {"all": plan.iteration},
            "tokens_per_second_per_chip": plan.tokens / plan.iteration / plan.chips,
            "update_share_of_peak": plan.share_of_peak,
            "chip_hours": plan.chip_hours,
            "price": None if price is None else plan.chip_hours * price,
        }
        if plan.fits
        else {}
    )
    names = ("iteration_seconds", "tokens_per_second_per_chip", "update_share_of_peak", "chip_hours", "price")
    return json.dumps(
        {
            "topology": plan.topology,
            "chips": plan.chips,
            "devices_per_chip": plan.chip.devices,
            "compiled": plan.compiled,
            "fits": plan.fits,
            "usable_bytes": int(USABLE * plan.chip.hbm),
            "held_bytes": plan.kinds,
            "programs": {program.planned.name: _program(program) for program in plan.programs},
            "mean_response_length": plan.mean_response,
        }
        | {name: reckoned.get(name) for name in names}
    )


def _program(program: ProgramPlan) -> dict[str, Any]:
    planned = program.planned
    return {
        "runs": planned.runs,
        "argument_bytes": planned.argument_bytes,
        "output_bytes": planned.output_bytes,
        "temp_bytes": planned.temp_bytes,
        "resident_bytes": program.resident,
        "fits": program.fits,
        "refused": planned.refused,
        "flops": sum(planned.cost.flops.values()),
        "hbm_bytes": planned.cost.bytes,
        "collective_bytes": program.collectives,
        "seconds": {"compute": program.bound.compute, "memory": program.bound.memory, "links": program.bound.links},
        "bound_by": program.bound.by,
        "compile_seconds": round(planned.compile_seconds, 1),
    }
