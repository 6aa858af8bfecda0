"""A study's results in a folder: one self-contained page, its pictures as files, and the table of effects."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcjax.reporting.html import render_page
from dcjax.reporting.record import write_atomically
from dcjax.tools.lab.figures import draw_curves, draw_doses, draw_gains, draw_noise
from dcjax.tools.lab.results import AT_THE_END, Result
from dcjax.tools.lab.schedule import count_made, total, tuned_rates
from dcjax.tools.lab.study import Cell, Study
from dcjax.tools.lab.table import HEADER, rows_of, summaries_of
from dcjax.tools.lab.verdicts import Effect, effects_of


def write_page(folder: Path, study: Study, made: Mapping[Cell, Result], *, command: str) -> Path:
    """Writes what has been found so far: `page.html`, and a PNG file a picture.

    Args:
      folder: it is made if it is not there.
      study: whose results they are.
      made: the finished runs.
      command: that makes the runs, as a reader would type it.

    Returns:
      the page's path.
    """
    done = {cell: result.figures for cell, result in made.items()}
    effects = effects_of(study, done)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(study, made, effects)
    for name, (_, picture) in pictures.items():
        write_atomically(folder / f"{name}.png", picture)
    others = [name for name in AT_THE_END if name != study.metric]
    text = render_page(
        _BODY,
        style=_STYLE,
        title=f"{study.name}: findings",
        claims=summaries_of(study, effects),
        command=command,
        made=count_made(study, done),
        total=total(study),
        header=HEADER,
        tables={study.metric: _rows(effects)} | {name: _rows(effects_of(study, done, figure=name)) for name in others},
        rates=sorted(tuned_rates(study, done).items()),
        pictures={title: base64.b64encode(picture).decode("ascii") for title, picture in pictures.values()},
        made_by=sorted(
            {f"{result.made_by.get('commit')} {result.made_by.get('versions')}" for result in made.values()}
        ),
    )
    write_atomically(path := folder / "page.html", text.encode())
    return path


def _rows(effects: Sequence[Effect]) -> list[list[str]]:
    """The cells of the effects that there are runs of."""
    return rows_of([effect for effect in effects if effect.gain is not None])


def _pictures(study: Study, made: Mapping[Cell, Result], effects: Sequence[Effect]) -> dict[str, tuple[str, bytes]]:
    """Titles and PNGs by the names of their files."""
    of_metric = [effect for effect in effects if effect.metric == study.metric]
    pictures = _pictures_of_gains(study, of_metric)
    for metric in dict.fromkeys(claim.metric for claim in study.claims if claim.metric):
        # the margin is one of the study's metric
        of_other = [effect for effect in effects if effect.metric == metric]
        pictures[f"gains_{metric}"] = (f"Gains: {metric}", draw_gains(of_other, None))
    doses = draw_doses(of_metric, study.claims[0].against[0], study.margin)
    pictures["doses"] = ("What pays at which gap", doses)
    pictures["noise"] = ("Gap and gradient norm", draw_noise(study, made))
    return pictures | _pictures_of_curves(study, made)


def _pictures_of_gains(study: Study, effects: Sequence[Effect]) -> dict[str, tuple[str, bytes]]:
    """Those of claims with verdicts, and of the others at the study's formats and at other ones."""
    judged = {claim.key for claim in study.claims if claim.verdict}
    looks = [effect for effect in effects if effect.claim not in judged]
    groups = {
        "gains": ("Gains", [effect for effect in effects if effect.claim in judged]),
        "first_looks": ("First looks", [effect for effect in looks if effect.format in study.formats]),
        "first_looks_elsewhere": (
            "First looks at other formats",
            [effect for effect in looks if effect.format not in study.formats],
        ),
    }
    return {name: (title, draw_gains(group, study.margin)) for name, (title, group) in groups.items() if group}


def _pictures_of_curves(study: Study, made: Mapping[Cell, Result]) -> dict[str, tuple[str, bytes]]:
    """One a task of all claims with verdicts, and those that claims ask for."""
    judged = [claim for claim in study.claims if claim.verdict]
    wanted = {task: (task, judged) for claim in judged for task in claim.tasks}
    wanted |= {f"{claim.key}_{task}": (task, [claim]) for claim in study.claims if claim.drawn for task in claim.tasks}
    return {
        f"curves_{name}": (f"Curves: {name.replace('_', ', ')}", draw_curves(study, made, claims, task))
        for name, (task, claims) in wanted.items()
    }


_STYLE = """\
body { max-width: 90rem }
table { font-size: .85rem }
th, td { padding-right: .8rem; white-space: nowrap }
"""

_BODY = """\
<h1>{{ title }}</h1>
<p>{{ made }} of {{ total }} runs are made. <code>{{ command }}</code> makes the others.</p>
<h2>Claims</h2>
<ul>
{% for claim in claims %}
<li><b>{{ claim.key }}</b> {{ claim.hypothesis }} <i>{{ claim.verdicts }}</i>

{% for line in claim.full %}<br><code>dcjax train {{ line }}</code>{% endfor %}</li>
{% endfor %}
</ul>
{% for name, rows in tables.items() %}
<details {% if loop.first %}open{% endif %}><summary>{{ name }}</summary>
<div class="wide"><table>
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
</details>
{% endfor %}
<h2>Rates</h2>
<p>{% for (task, arm), rate in rates %}
{{ task }}, {{ arm }}: {{ "%g" | format(rate) }}{{ "; " if not loop.last }}
{% endfor %}</p>
{% for title, picture in pictures.items() %}
<h2>{{ title }}</h2>
<img alt="{{ title }}" src="data:image/png;base64,{{ picture }}">
{% endfor %}
<h2>Made by</h2>
<ul>{% for each in made_by %}<li>{{ each }}</li>{% endfor %}</ul>
"""
