"""A study's results as one self-contained page: the table of effects, the same of the other figures, and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from dcjax.reporting.record import write_atomically
from dcjax.tools.lab.figures import draw_curves, draw_doses, draw_gains
from dcjax.tools.lab.results import AT_THE_END, Result
from dcjax.tools.lab.schedule import count_made, total, tuned_rates
from dcjax.tools.lab.study import Cell, Study
from dcjax.tools.lab.table import HEADER, rows_of
from dcjax.tools.lab.verdicts import effects_of


def write_page(path: Path, study: Study, made: Mapping[Cell, Result], *, command: str) -> None:
    """Writes the page of what has been run so far.

    Args:
      path: of the HTML file.
      study: whose results they are.
      made: the finished runs.
      command: that makes the runs, as a reader would type it.
    """
    from jinja2 import Environment, StrictUndefined

    done = {cell: result.figures for cell, result in made.items()}
    effects = effects_of(study, done)
    pictures = {"Gains": draw_gains(effects)}
    pictures |= {f"Curves: {task.name}": draw_curves(study, made, task.name) for task in study.tasks}
    pictures |= {"What pays at which gap": draw_doses(effects, study.claims[0].against[0])}
    others = [name for name in AT_THE_END if name != study.metric]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(_PAGE).render(
        study=study,
        command=command,
        made=count_made(study, done),
        total=total(study),
        header=HEADER,
        tables={study.metric: rows_of(effects)}
        | {name: rows_of(effects_of(study, done, figure=name)) for name in others},
        rates=sorted(tuned_rates(study, done).items()),
        pictures={title: base64.b64encode(picture).decode("ascii") for title, picture in pictures.items()},
        made_by=sorted(
            {f"{result.made_by.get('commit')} {result.made_by.get('versions')}" for result in made.values()}
        ),
    )
    write_atomically(path, text.encode())


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ study.name }}: findings</title>
<style>
:root { color-scheme: light dark }
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; font: 1rem/1.5 system-ui, sans-serif }
img { max-width: 100%; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap }
</style>
</head>
<body>
<h1>{{ study.name }}</h1>
<p>{{ made }} of {{ total }} runs are made. <code>{{ command }}</code> makes the others.</p>
<h2>Claims</h2>
<ul>
{% for claim in study.claims %}
<li><b>{{ claim.key }}</b> {{ claim.hypothesis }}{% if not claim.verdict %} (a first look, no verdict){% endif %}</li>
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
</body>
</html>
"""
