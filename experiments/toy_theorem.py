"""The toy problem of paper A (figures 6 and 7), Theorem 3.1 and eq. 13 of paper B: tables, PNG figures. Not a recipe.

Six actions, {high, medium, low} probability × {negative, positive} advantage, one budget for all forms of the
discrepancy. The paper's own values and budget were not recovered; these are ours.

Theorem 3.1 is enumerated for responses of up to 8 tokens from a vocabulary of 3. The policy's logits depend on the
token before; R = 1 where at least half of a response is the first token. The sampler's logits differ by .02 · normal,
drawn for each prefix ("own"), or once for all prefixes that end alike ("shared"), as rounded weights make it.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from dcjax.paths import local_path
from dcjax.rl.theory import (
    Optimum,
    best_lr,
    difference_optimum,
    expected_improvement,
    gradient_bias,
    log_linear_policy,
    log_ratio_optimum,
    ratio_optimum,
)

Q = np.array([0.30, 0.30, 0.14, 0.14, 0.06, 0.06])
ADVANTAGES = np.array([-0.5, 0.5, -0.8, 0.8, -1.2, 1.2])
BUDGET = 0.1

# of eq. 13's figure: ‖∇J‖ = 1 and L = 1, so that the learning rate is in units of 1/L
GRADIENT = np.array([1.0, 0.0])
BIAS = np.array([-0.3, 0.2])
VARIANCES = (0.0, 1.0, 4.0)

# of Theorem 3.1's figure
TOKENS, LENGTHS, PAIRS, GAP = 3, (1, 2, 4, 8), 40, 0.02

# Okabe and Ito's colours, told apart under the common colour-vision deficiencies
GREY, COLOURS = "0.75", ("#0072B2", "#D55E00", "#009E73")
LOOK = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}

Optima = dict[str, Optimum]


def solve(budget: float) -> tuple[Optima, Optima]:
    """The two-sided optima of figure 6 and the one-sided ones of figure 7, by the name of their m."""
    problem = {"advantages": ADVANTAGES, "q": Q, "budget": budget}
    two_sided = {
        "π − q": difference_optimum(**problem),
        "π/q − 1": ratio_optimum(**problem),
        "log(π/q)": log_ratio_optimum(**problem),
    }
    one_sided = {
        "max(π − q, 0)": difference_optimum(**problem, one_sided=True),
        "max(π/q − 1, 0)": ratio_optimum(**problem, one_sided=True),
    }
    return two_sided, one_sided


def table(optima: Optima) -> str:
    """One row a form: β, ν, the budget spent, the expected advantage, and the policy."""
    heads = "".join(f"{f'q {q:.2f}, A {a:+.1f}':>16}" for q, a in zip(Q, ADVANTAGES, strict=True))
    lines = [f"{'m':<16}{'β':>9}{'ν':>9}{'Σ m²':>9}{'Σ π A':>9}{heads}"]
    for form, (policy, beta, nu, spent) in optima.items():
        cells = "".join(f"{probability:>16.4f}" for probability in policy)
        lines.append(f"{form:<16}{beta:>9.4f}{nu:>+9.4f}{spent:>9.4f}{policy @ ADVANTAGES:>+9.4f}{cells}")
    return "\n".join(lines)


def draw_optima(optima: Optima, title: str, budget: float) -> Figure:
    """Every action's probability, and its ratio to q, under each form."""
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
        figure.suptitle(f"{title}, budget Σ m² = {budget:g}", fontweight="bold")
        left, right = figure.subplots(1, 2)
        _draw_bars(left, "probability", {"q": Q} | {form: optimum.policy for form, optimum in optima.items()})
        _draw_bars(right, "π / q", {form: optimum.policy / Q for form, optimum in optima.items()})
        right.axhline(1, color="0.3", linewidth=1)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_bars(axes, quantity: str, rows: dict[str, np.ndarray]) -> None:
    width = 0.84 / len(rows)
    colours = [GREY, *COLOURS] if "q" in rows else list(COLOURS)
    places = np.arange(len(Q))
    for number, (label, values) in enumerate(rows.items()):
        offset = (number - (len(rows) - 1) / 2) * width
        axes.bar(places + offset, values, width * 0.92, color=colours[number], label=label)
        # a bar without height has to be told from one that is missing
        for place in places[values < 1e-12]:
            axes.text(place + offset, 0, "0", color=colours[number], ha="center", va="bottom", fontsize=10)
    axes.set_xticks(
        places, [f"q = {q:.2f}\nA = {a:+.1f}".replace("-", "−") for q, a in zip(Q, ADVANTAGES, strict=True)]
    )
    axes.tick_params(axis="x", length=0)
    axes.set_title(quantity, loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.8)


def draw_improvement() -> Figure:
    """Eq. 13 against the learning rate, for several variances of the gradient estimate, with and without bias."""
    rates = np.linspace(0, 2, 201)
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(9.6, 5), dpi=110, layout="constrained")
        axes = figure.subplots()
        for variance, colour in zip(VARIANCES, COLOURS, strict=True):
            for bias, line in ((np.zeros(2), "-"), (BIAS, "--")):
                known = {"gradient": GRADIENT, "bias": bias, "variance": variance, "curvature": 1.0}
                gains = [expected_improvement(**known, lr=rate).total for rate in rates]
                label = f"variance {variance:g}, {'‖bias‖ = .36' if bias.any() else 'no bias'}"
                axes.plot(rates, gains, line, color=colour, label=label)
                best = best_lr(**known)
                axes.plot(best, expected_improvement(**known, lr=best).total, "o", color=colour, markersize=7)
        axes.axhline(0, color="0.3", linewidth=1)
        axes.set_ylim(-0.6, 0.6)
        axes.set_xlim(0, 2)
        axes.set_xlabel("learning rate η (units of 1/L)")
        axes.set_ylabel("E[J(θ + ηg)] − J(θ), ‖∇J‖ = L = 1")
        axes.set_title("Eq. 13: noise lowers the best learning rate (dots)", loc="left", fontweight="bold")
        axes.grid(color="0.9", linewidth=0.8)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def biases() -> dict[str, np.ndarray]:
    """‖∇J_actual − ∇J‖ and its bound [LENGTHS, PAIRS, 2], by how the gap is drawn."""
    generator = np.random.default_rng(0)
    found = {kind: np.zeros((len(LENGTHS), PAIRS, 2)) for kind in ("own", "shared")}
    for kind, pair in itertools.product(found, range(PAIRS)):
        logits, gaps = generator.normal(size=(2, (TOKENS + 1) * TOKENS)) * [[1.0], [GAP]]
        for row, length in enumerate(LENGTHS):
            features = [_features(step) for step in range(length)]
            policy, scores = log_linear_policy(features, logits)
            if kind == "shared":
                behaviour, _ = log_linear_policy(features, logits + gaps)
            else:
                moved = [table * np.exp(GAP * generator.normal(size=table.shape)) for table in policy]
                behaviour = [table / table.sum(axis=1, keepdims=True) for table in moved]
            responses = np.array(list(itertools.product(range(TOKENS), repeat=length)))
            rewards = ((responses == 0).sum(axis=1) >= length / 2).astype(float)
            bias = gradient_bias(policy=policy, behaviour=behaviour, scores=scores, rewards=rewards)
            found[kind][row, pair] = bias.distance, bias.bound
    return found


def _features(step: int) -> np.ndarray:
    """φ [prefixes, TOKENS, parameters]: one-hot in (token before, token); the first has none before it."""
    before = np.full(1, TOKENS) if step == 0 else np.arange(TOKENS**step) % TOKENS
    return np.eye((TOKENS + 1) * TOKENS)[before[:, None] * TOKENS + np.arange(TOKENS)]


def bias_table(found: dict[str, np.ndarray]) -> str:
    """One row a length: the medians of the bias and of its bound."""
    lines = [f"{'T':<6}" + "".join(f"{f'{kind}: bias':>16}{'bound':>10}" for kind in found)]
    for row, length in enumerate(LENGTHS):
        medians = [np.median(values[row], axis=0) for values in found.values()]
        lines.append(f"{length:<6}" + "".join(f"{bias:>16.5f}{bound:>10.4f}" for bias, bound in medians))
    return "\n".join(lines)


def draw_bias(found: dict[str, np.ndarray]) -> Figure:
    """Theorem 3.1: the bias of the gradient, and its bound, against the length of responses."""
    with style.context(["default", LOOK]):
        figure = Figure(figsize=(7.5, 5), dpi=110, layout="constrained")
        axes = figure.subplots()
        for (kind, values), colour in zip(found.items(), COLOURS, strict=False):
            for column, (name, line) in enumerate((("bias", "o-"), ("bound 2BΔT²", "--"))):
                axes.loglog(
                    LENGTHS, np.median(values[..., column], axis=1), line, color=colour, label=f"{kind}: {name}"
                )
        axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes.minorticks_off()
        axes.set(xlabel="tokens of a response, T", ylabel="‖∇J_actual − ∇J‖, median of 40 pairs")
        axes.set_title("Theorem 3.1: the bias of a shared gap grows with T", loc="left", fontweight="bold")
        axes.grid(color="0.9", linewidth=0.8)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    """Solves, prints and draws."""
    summary, details = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument(
        "--out", type=local_path, default=Path("runs/toy_theorem"), help="folder of the figures (%(default)s)"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="ε of Σ m² = ε, for every form (%(default)s)")
    options = parser.parse_args()
    try:
        two_sided, one_sided = solve(options.budget)
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"two-sided (figure 6)\n{table(two_sided)}\n\none-sided (figure 7)\n{table(one_sided)}\n")
    found = biases()
    print(f"bias of the gradient (Theorem 3.1)\n{bias_table(found)}\n")
    figures = {
        "figure6.png": draw_optima(two_sided, "Two-sided: every change from q is penalised", options.budget),
        "figure7.png": draw_optima(one_sided, "One-sided: only π > q is penalised", options.budget),
        "theorem31.png": draw_bias(found),
        "eq13.png": draw_improvement(),
    }
    for name, figure in figures.items():
        figure.savefig(options.out / name)
        print(f"figure: {options.out / name}")


if __name__ == "__main__":
    main()
