"""Floor 5: the HTML of a report: one page, no network, no scripts. Everything that comes from a run is escaped here, in one place.

`Markup` is text that is already HTML; plain text given to any function of this module is escaped.
"""

import html
from typing import Sequence


class Markup(str):
    """HTML made by this module; anything else is text and is escaped."""


_CSS = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #e3e7ed; --wash: #f6f8fb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 28px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 0 0 2px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); } .small { font-size: 13px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); margin-top: 14px; }
.grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; overflow-x: auto; margin-top: 14px; }
.grid > .card { margin-top: 0; }
.card img { display: block; width: 100%; height: auto; margin-top: 6px; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 7px; }
.pill { display: inline-block; font-size: 12px; font-weight: 600; padding: 1px 9px; border-radius: 99px; }
.pill { background: #e7f5ee; color: #17704a; }
.pill.open { background: #fdf1dd; color: #8a5a00; }
.key { display: inline-block; margin-right: 18px; white-space: nowrap; }
.bar { display: flex; height: 16px; border-radius: 5px; overflow: hidden; margin: 2px 0 10px; } .bar i { display: block; }
.verdict { font-weight: 600; margin: 8px 0 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 8px; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); text-align: left; vertical-align: bottom; }
th { border-bottom: 1.5px solid #cfd6e0; }
td { vertical-align: top; border-bottom: 1px solid var(--line); } tr:last-child td { border-bottom: 0; }
th, td { padding: 6px 14px 6px 0; } th:last-child, td:last-child { padding-right: 0; }
th.n, td.n { text-align: right; white-space: nowrap; }
tr.strong td { font-weight: 600; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
td details { margin: 0; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """Returns a value as HTML: markup of this module as it is, everything else escaped, quotes included."""
    return value if isinstance(value, Markup) else html.escape(str(value), quote=True)


def tag(name: str, *children: object, css: str = "") -> Markup:
    """Returns one element.

    Args:
        name: the element's name.
        *children: markup or text; text is escaped.
        css: its classes.

    Returns:
        The element as markup.
    """
    opening = f'<{name} class="{text(css)}">' if css else f"<{name}>"
    return Markup(opening + "".join(map(text, children)) + f"</{name}>")


def joined(parts: Sequence[object]) -> Markup:
    """Returns markup and text one after the other, text escaped."""
    return Markup("".join(map(text, parts)))


def dot(colour: str) -> Markup:
    """Returns a coloured dot, the mark of a run.

    Args:
        colour: a CSS colour, chosen by the report and never taken from a run.
    """
    return Markup(f'<span class="dot" style="background:{text(colour)}"></span>')


def image(data_uri: str, alternative: str) -> Markup:
    """Returns an image that is part of the page.

    Args:
        data_uri: "data:image/..." address.
        alternative: what the image shows, for those who can not see it.
    """
    return Markup(f'<img src="{text(data_uri)}" alt="{text(alternative)}">')


def bar(parts: Sequence[tuple[float, str]]) -> Markup:
    """Returns one bar cut into (share, CSS colour) parts."""
    cut = [f'<i style="width:{100 * share:.2f}%;background:{text(colour)}"></i>' for share, colour in parts]
    return Markup(f'<div class="bar">{"".join(cut)}</div>')


def facts(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Returns names and values in two columns."""
    return tag("dl", *(joined([tag("dt", name), tag("dd", value)]) for name, value in pairs))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[int] = (), strong: Sequence[int] = (),
          caption: object = "") -> Markup:
    """Returns a table.

    Args:
        header: names of the columns.
        rows: cells, markup or text.
        numeric: indices of the columns that are set right-aligned.
        strong: indices of the rows that stand out.
        caption: what the table shows.

    Returns:
        The table as markup.
    """
    def cells(name: str, row: Sequence[object]) -> list[Markup]:
        return [tag(name, cell, css="n" if i in numeric else "") for i, cell in enumerate(row)]

    body = [tag("tr", *cells("td", row), css="strong" if i in strong else "") for i, row in enumerate(rows)]
    head = tag("thead", tag("tr", *cells("th", header)))
    return tag("table", tag("caption", caption) if caption else Markup(), head, tag("tbody", *body))


def page(title: str, lead: object, sections: Sequence[tuple[str, object, object]]) -> str:
    """Returns the whole document.

    Args:
        title: of the page.
        lead: one paragraph under the title.
        sections: (heading, what is seen, content) in order; empty content leaves the section out.

    Returns:
        HTML5; its content security policy forbids scripts and every address outside the page.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    parts = [tag("h1", title), tag("p", lead, css="soft")]
    for heading, seen, content in sections:
        if content:
            parts += [tag("h2", heading), tag("p", seen, css="soft"), content]
    head = (f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{text(title)}</title><style>{_CSS}</style>')
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{tag("main", *parts)}</body></html>\n'
