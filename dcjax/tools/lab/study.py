"""A study as data: tasks, arms, formats and seeds, and the claims that are to be judged by them.

A study file is a Python file with a function `study() -> Study`, as a recipe has `config()`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

Settings = tuple[str, ...]
"""Fields of a run, as `dcjax train` takes them: section.field=value."""


@dataclass(frozen=True)
class LabTask:
    """What is learned, and from what all arms of a seed begin."""

    name: str
    recipe: str
    """A recipe as `dcjax train` names it."""
    settings: Settings = ()
    """Of every run of the task, RL and warm start alike."""


@dataclass(frozen=True)
class Arm:
    """A method: what it changes in the recipe."""

    name: str
    settings: Settings = ()


@dataclass(frozen=True)
class Claim:
    """A hypothesis, that each arm ends better than each of the others it is held against, under mismatch."""

    key: str
    """Its number in the papers' and our lists: A4, N6."""
    hypothesis: str
    """One sentence."""
    arms: tuple[str, ...]
    against: tuple[str, ...]
    tasks: tuple[str, ...]
    formats: tuple[str, ...]
    verdict: bool = True
    """Whether there are seeds enough to judge it; without, its effects are shown, and no verdict."""
    rate: float | None = None
    """The learning rate of all its runs; where None, each arm's own, which is tuned on each task."""
    metric: str = ""
    """The figure that it is about; the study's where empty."""
    drawn: bool = False
    """Whether the curves of its runs are a picture of their own; claims with verdicts share one a task anyway."""
    full: tuple[str, ...] = ()
    """The same question at full scale: recipes and their fields, as `dcjax train` and `dcjax plan` take them."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(arm, the arm it is held against), all of them."""
        return tuple((arm, other) for arm in self.arms for other in self.against if arm != other)

    @property
    def all_arms(self) -> tuple[str, ...]:
        """Those of both sides, each once."""
        return tuple(dict.fromkeys(arm for pair in self.pairs for arm in pair))


@dataclass(frozen=True, order=True)
class Cell:
    """One run's place in a study. The rate is None for a warm start, whose arm and format are empty too."""

    task: str
    seed: int
    arm: str = ""
    format: str = ""
    rate: float | None = None

    @property
    def start(self) -> Cell:
        """The warm start that the run begins with."""
        return Cell(self.task, self.seed)

    @property
    def name(self) -> str:
        """Of the run's folder."""
        if self.rate is None:
            return f"{self.task}_start_{self.seed}"
        return f"{self.task}_{self.arm}_{self.format}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class Study:
    """All that is compared.

    Raises:
      ValueError: two arms are the same; a claim names an arm or task that there is not; the twin is among the formats;
        seeds that tune are seeds that judge; there is nothing to choose a rate from; or the margin is not above 0.
    """

    name: str
    tasks: tuple[LabTask, ...]
    arms: tuple[Arm, ...]
    formats: tuple[str, ...]
    """Serving formats with a mismatch that rates are tuned for; a claim may have others."""
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    """Of the runs that claims are judged by."""
    few_seeds: tuple[int, ...]
    """Those of claims without a verdict."""
    tuning_seeds: tuple[int, ...]
    """Of the runs that rates are chosen by."""
    rates: tuple[float, ...]
    common: Settings = ()
    """Of every run of RL."""
    start_settings: Settings = ()
    """Of every warm start."""
    twin: str = "float32"
    """The format without a mismatch."""
    metric: str = "deployed"
    """The figure that rates are chosen by, and that claims are judged by."""
    margin: float = 0.01
    """The smallest difference of the metric that would matter."""

    def __post_init__(self):
        named_by: dict[Settings, str] = {}
        for arm in self.arms:
            if (other := named_by.setdefault(arm.settings, arm.name)) != arm.name:
                raise ValueError(f"arms {other!r} and {arm.name!r} have the same settings; they must differ")
        known = {"arms": {arm.name for arm in self.arms}, "tasks": {task.name for task in self.tasks}}
        for claim in self.claims:
            named = {"arms": {*claim.arms, *claim.against}, "tasks": {*claim.tasks}}
            for kind, names in named.items():
                if unknown := sorted(names - known[kind]):
                    raise ValueError(
                        f"claim {claim.key} names {unknown[0]!r} among its {kind}; the study has "
                        f"{', '.join(sorted(known[kind]))}"
                    )
            if self.twin in (*self.formats, *claim.formats):
                raise ValueError(f"formats has {self.twin!r}, which is the twin's; it must be none of them")
            if claim.rate is None and not self.rates:
                raise ValueError(f"claim {claim.key} has no rate, and the study has none to choose from")
        if not self.margin > 0:
            raise ValueError(f"margin is {self.margin}; it must be above 0")
        if both := {*self.seeds, *self.few_seeds} & {*self.tuning_seeds}:
            raise ValueError(f"tuning_seeds has {min(both)}, by which claims are judged; they must be others")

    def task(self, name: str) -> LabTask:
        """The task of a name."""
        return next(task for task in self.tasks if task.name == name)

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, claim: Claim) -> tuple[int, ...]:
        """The seeds that a claim is looked at with."""
        return self.seeds if claim.verdict else self.few_seeds

    def settings(self, cell: Cell) -> Settings:
        """What `dcjax train` is given behind the recipe, but for its directory and weights."""
        task = self.task(cell.task)
        if cell.rate is None:
            return (f"seed={cell.seed}", *task.settings, *self.start_settings)
        return (
            *(f"seed={cell.seed}", *task.settings, *self.common, *self.arm(cell.arm).settings),
            *(f"serving.format={cell.format}", f"optimizer.learning_rate={cell.rate:g}"),
        )

    def identity(self, cell: Cell) -> str:
        """16 hexadecimal digits of all that is chosen for a run: recipe, settings, and those of its warm start."""
        start = self.settings(cell.start) if cell.rate is not None else ()
        chosen = "\n".join((self.task(cell.task).recipe, *start, "", *self.settings(cell)))
        return hashlib.sha256(chosen.encode()).hexdigest()[:16]

    def only(self, keys: tuple[str, ...]) -> Study:
        """The study with some of its claims.

        Raises:
          ValueError: there is no such claim.
        """
        there = [claim.key for claim in self.claims]
        if unknown := [key for key in keys if key not in there]:
            raise ValueError(f"claim {unknown[0]!r} is none of the study's: {', '.join(there)}")
        return replace(self, claims=tuple(claim for claim in self.claims if claim.key in keys))

    def quick(self) -> Study:
        """The study in little: few seeds, the middle rate, each claim's last format alone, and no verdicts."""
        claims = (replace(claim, formats=claim.formats[-1:], verdict=False) for claim in self.claims)
        middle = sorted(self.rates)[len(self.rates) // 2 :][:1]
        return replace(self, formats=self.formats[-1:], rates=tuple(middle), claims=tuple(claims))


def cells_of(study: Study, claim: Claim, rates: dict[tuple[str, str], float]) -> Iterator[Cell]:
    """The runs that a claim is judged by, a seed of every arm before the next one.

    Args:
      study: whose claim it is.
      claim: of the study.
      rates: by (task, arm), for the arms that are tuned already; the others' runs are left out.
    """
    for seed in study.seeds_of(claim):
        for task in claim.tasks:
            for format in (*claim.formats, study.twin):
                for arm in claim.all_arms:
                    if (rate := claim.rate or rates.get((task, arm))) is not None:
                        yield Cell(task, seed, arm, format, rate)
