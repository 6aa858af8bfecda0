"""The shell of the HTML pages: one file each, that loads nothing from elsewhere and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from typing import Any


def render_page(
    body: str, *, style: str = "", script: str = "", filters: Mapping[str, Callable] | None = None, **values: Any
) -> str:
    """An HTML page, everything in it escaped but what the templates say.

    Args:
      body: a Jinja template of what stands in the page's body; it may use `values`, among them `title`.
      style: rules behind the shell's own.
      script: the one that browsers are allowed to run, by its hash.
      filters: Jinja filters that the body uses, by name.
      values: what the templates name.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=DictLoader({"body": body}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"script-src 'sha256-{digest}'" if script else "script-src 'none'"
    shell = _SHELL.replace("/* style */", style)
    return environment.from_string(shell).render(script=Markup(script), script_source=Markup(allowed), **values)


_SHELL = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; {{ script_source }}">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f6670; --page: #fff; --card: #f4f5f7; --rule: #d9dce1;
  --blue: #0072b2; --vermillion: #d55e00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa2ad; --page: #16181c; --card: #21242a; --rule: #3a3f47;
    --blue: #56b4e9; --vermillion: #ff8a3d }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem }
small, .faint { color: var(--faint) }
img { box-sizing: border-box; width: 100%; padding: .5rem; border-radius: .5rem; background: #fff }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
/* style */
</style>
</head>
<body>
{% include "body" %}
{% if script %}
<script>{{ script }}</script>
{% endif %}
</body>
</html>
"""
