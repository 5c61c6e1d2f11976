"""A run as one HTML page that needs nothing but itself: style and pictures are inside, no script, no request."""

from __future__ import annotations

import base64
import html
import io
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Caption, header, rows."""


@dataclass
class Section:
    """A chapter of the report."""

    title: str
    """Heading, and entry in the table of contents."""
    text: str = ""
    """Plain text; an empty line ends a paragraph, lines that begin with "- " are a list, web addresses become links."""
    figures: Sequence[tuple[str, bytes]] = field(default_factory=list)
    """Caption and picture as a PNG file; the caption is the text for those who cannot see it."""
    tables: Sequence[Table] = field(default_factory=list)
    """Caption, header and rows; each row as long as the header."""


def render(
    title: str, summary: Sequence[tuple[str, str]], sections: Sequence[Section], options: Mapping[str, object]
) -> str:
    """The page: tiles of (label, value), the sections with a table of contents, and the options of the run.

    `options` may be nested; names are joined with dots. All text is escaped. Raises ValueError for a picture that is
    no PNG file and for a table row of the wrong length.
    """
    tiles = "".join(f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>" for label, value in summary)
    tiles = tiles and f"<dl class='tiles'>{tiles}</dl>"
    chapters = [(section.title, _section(section)) for section in sections]
    flat = _flat(options)
    if flat:
        # Exactly as given, unlike the numbers in tables.
        pairs = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(str(value))}</dd></div>" for name, value in flat)
        chapters.append(("Options", f"<dl class='options'>{pairs}</dl>"))
    contents = "".join(f"<li><a href='#section-{k}'>{_text(name)}</a></li>" for k, (name, _) in enumerate(chapters, 1))
    body = "".join(
        f"<section id='section-{k}'><h2>{_text(name)}</h2>{inside}</section>"
        for k, (name, inside) in enumerate(chapters, 1)
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        # Holds the browser to the promise: nothing is fetched and nothing runs.
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">"
        f"<link rel='icon' href='data:,'><title>{_text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{_text(title)}</h1>{tiles}</header>\n"
        f"<nav aria-label='Contents'><ol>{contents}</ol></nav>\n<main>{body}</main></body></html>\n"
    )


def cell(value: object) -> str:
    """A value as escaped text: integers whole, other numbers with three decimals or at least three digits."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isnan(number):
            return "\N{EN DASH}"
        if math.isinf(number):
            return "∞" if number > 0 else "-∞"
        size = abs(number)
        if size >= 1000:
            return f"{number:,.0f}"
        return f"{number:.1f}" if size >= 100 else f"{number:.3f}" if size >= 0.01 or size == 0 else f"{number:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    return _text(str(value))


def _section(section: Section) -> str:
    parts = [_prose(section.text)]
    for caption, picture in section.figures:
        parts.append(_figure(caption, picture))
    for caption, header, rows in section.tables:
        parts.append(_table(caption, header, rows))
    return "".join(parts)


def _prose(text: str) -> str:
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        # A block may be a paragraph, a list, or a paragraph that leads into a list.
        lines = [line.strip() for line in block.splitlines()]
        words = " ".join(line for line in lines if not line.startswith("- "))
        items = "".join(f"<li>{_linked(line[2:])}</li>" for line in lines if line.startswith("- "))
        parts.append((f"<p>{_linked(words)}</p>" if words else "") + (f"<ul>{items}</ul>" if items else ""))
    return "".join(parts)


def _linked(text: str) -> str:
    """Escaped text whose web addresses are links."""
    pieces = re.split(r"(https?://[^\s<>\"']*[^\s<>\"'.,;:!?)\]])", text)
    return "".join(f"<a href='{_text(p)}'>{_text(p)}</a>" if k % 2 else _text(p) for k, p in enumerate(pieces))


def _figure(caption: str, picture: bytes) -> str:
    try:
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
            # Shown in the size it was drawn for, where the file tells its resolution; 96 CSS pixels are an inch.
            scale = 96 / image.info.get("dpi", (96, 96))[0]
            width, height = round(image.width * scale), round(image.height * scale)
    except (OSError, TypeError) as error:
        raise ValueError(f"report: figure {caption!r} is no PNG file") from error
    source = base64.b64encode(picture).decode()
    return (
        f"<figure><div class='scroll{' wide' if width > 640 else ''}'><img alt='{_text(caption)}' "
        f"width='{width}' height='{height}' src='data:image/png;base64,{source}'></div>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(
                f"report: row {number} of table {caption!r} has {len(row)} cells, the header {len(header)}"
            )
    # A column of numbers stands flush right, its heading too.
    kinds = [" class='number'" if rows and all(_is_number(row[k]) for row in rows) else "" for k in range(len(header))]
    head = "".join(f"<th scope='col'{kind}>{_text(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell(value)}</td>" for value, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f"<div class='scroll'><table><caption>{_text(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, numbers.Real) and not isinstance(value, bool))


def _flat(options: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested options as (dotted name, value)."""
    pairs: list[tuple[str, object]] = []
    for name, value in options.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return pairs


def _text(text: str) -> str:
    return html.escape(text, quote=True)


STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2933; --soft: #5b6675; --rule: #dfe3e8; --card: #f5f7f9;
  --accent: #005a94; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e4e8ed; --soft: #9aa5b1; --rule: #2d343d;
  --card: #1c2229; --accent: #6cb8ee; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 4rem; }
body { margin: 0 auto; max-width: 86rem; padding: 2rem 1.5rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .75rem; }
a { color: var(--accent); }
p, ul { max-width: 46rem; margin: 0 0 1rem; }
ul { padding-left: 1.25rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 0 0 1.25rem; }
.tiles div { display: flex; flex-direction: column; justify-content: space-between; padding: .8rem 1rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
.tiles dd { margin: .25rem 0 0; font-size: 1.6rem; font-weight: 600; line-height: 1.2; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
nav { position: sticky; top: 0; z-index: 1; overflow-x: auto; margin-bottom: 2rem; background: var(--page);
  border-bottom: 1px solid var(--rule); font-size: .92rem; }
nav ol { display: flex; gap: 1.6rem; margin: 0; padding: .7rem 0; list-style: none; white-space: nowrap; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section + section { margin-top: 2.5rem; padding-top: 1.75rem; border-top: 1px solid var(--rule); }
figure { margin: 0 0 1.75rem; }
figcaption, caption { color: var(--soft); font-size: .9rem; line-height: 1.45; text-align: left; }
figcaption { margin-top: .5rem; max-width: 46rem; }
caption { padding-bottom: .5rem; color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 1.75rem; }
figure .scroll { width: fit-content; max-width: 100%; margin: 0; padding: .6rem; background: #fff;
  border: 1px solid var(--rule); border-radius: .5rem; }
img { display: block; max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
.number { text-align: right; padding-left: .9rem; white-space: nowrap; }
.number + td:not(.number), .number + th:not(.number) { padding-left: .9rem; }
.options { margin: 0; columns: 21rem; column-gap: 2.5rem; }
.options div { display: flex; justify-content: space-between; gap: 1rem; padding: .3rem 0; break-inside: avoid;
  border-bottom: 1px solid var(--rule); font-size: .9rem; }
.options dt { font-family: ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; }
.options dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
section > :last-child { margin-bottom: 0; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tiles dd { font-size: 1.3rem; }
  nav { position: static; }
  nav ol { flex-wrap: wrap; gap: .4rem 1.2rem; }
  .wide img { width: 44rem; max-width: none; }
}
@media print {
  :root { --page: #fff; --ink: #000; --soft: #444; --rule: #bbb; --card: #fff; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { position: static; }
  nav ol { flex-wrap: wrap; }
  figure, tr, .tiles div { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  .scroll { overflow: visible; }
  figure .scroll { border: 0; padding: 0; }
  img { max-height: 16cm; object-fit: contain; object-position: left; }
}
"""
