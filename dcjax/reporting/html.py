"""The shell of the HTML pages: one file each, without scripts, that loads nothing from elsewhere; light and dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def render_page(body: str, *, style: str = "", filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """An HTML page, everything in it escaped but what the templates say.

    Args:
      body: a Jinja template of what stands in the page's body; it may use `values`, among them `title`.
      style: rules behind the shell's own.
      filters: Jinja filters that the body uses, by name.
      values: what the templates name.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        loader=DictLoader({"body": body}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.from_string(_SHELL.replace("/* style */", style)).render(**values)


_SHELL = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #5f6670; --page: #fff; --card: #f4f5f7; --rule: #d9dce1 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --faint: #9aa2ad; --page: #16181c; --card: #21242a; --rule: #3a3f47 }
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
</body>
</html>
"""
