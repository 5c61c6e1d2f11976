"""The report: one page that holds what it was given, and asks for nothing."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import numpy as np
import pytest
from test_figures import SIZE, colour_images

from cae import plots
from cae.figures import png
from cae.images import encode_png
from cae.report import Section, cell, render


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.data: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data.append(data)

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]


EVIL = "<script>alert('1')</script>\" & co"


def evil_page() -> tuple[str, bytes]:
    picture = encode_png(colour_images(1)[0])
    figure = png(plots.confusion(np.eye(2, dtype=int), ["A", "B"], "t"))
    sections = [
        Section(
            f"First {EVIL}",
            f"A paragraph {EVIL}\ngoes on.\n\nSee https://example.org/a?b=1&c=2.\n- one\n- two {EVIL}",
            [(f"Picture {EVIL}", picture), ("Figure", figure)],
            [(f"Table {EVIL}", ["name", EVIL], [[EVIL, 0.12345], ["b", None]])],
        ),
        Section("Second"),
    ]
    return render(f"Title {EVIL}", [(EVIL, EVIL)], sections, {EVIL: EVIL, "train": {"lr": 4e-4}}), picture


def test_report_is_one_page_that_asks_for_nothing() -> None:
    text, picture = evil_page()
    page = Page(text)
    assert page.open == []
    allowed = {"html", "head", "meta", "link", "title", "style", "body", "header", "nav", "main", "section", "figure"}
    allowed |= {"h1", "h2", "dl", "dt", "dd", "div", "ol", "ul", "li", "a", "p", "img", "figcaption"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name, "data:")
            assert value.startswith("data:") or (tag == "a" and value.startswith(("#", "https://example.org/")))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    first, second = page.all("img")
    assert base64.b64decode(first["src"].removeprefix("data:image/png;base64,")) == picture
    assert (first["width"], first["height"]) == (str(SIZE), str(SIZE))
    # A figure is shown in the size it was drawn for.
    assert abs(int(second["width"]) - 96 * 4.6) <= 1


def test_report_escapes_everything_and_loses_nothing() -> None:
    text, _ = evil_page()
    assert "<script" not in text.lower()
    page = Page(text)
    seen = "\n".join(page.data)
    for part in ("Title", "First", "Picture", "Table"):
        assert f"{part} {EVIL}" in seen
    # Page title and section title twice each, both texts of the tile, paragraph, list item, caption of the picture,
    # caption, header and cell of the table, name and value of the option.
    assert seen.count(EVIL) == 2 + 2 + 2 + 1 + 1 + 1 + 3 + 2
    assert page.all("img")[0]["alt"] == f"Picture {EVIL}"
    links = [a["href"] for a in page.all("a")]
    assert "https://example.org/a?b=1&c=2" in links
    targets = {section["id"] for section in page.all("section")}
    assert {link[1:] for link in links if link.startswith("#")} == targets and len(targets) == 3
    assert {"0.123", "\N{EN DASH}", "train.lr", "0.0004", "one"} <= set(page.data)


def test_report_without_anything_is_still_a_page() -> None:
    page = Page(render("Empty", [], [], {}))
    assert page.open == [] and "Empty" in page.data


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"), (np.int64(13883), "13,883"), (True, "yes"), (np.bool_(False), "no"), (0.0, "0.000"),
        (0.95349, "0.953"), (np.float32(0.5), "0.500"), (-0.25, "-0.250"), (0.00123456, "0.00123"), (12.3456, "12.346"),
        (123.456, "123.5"), (54321.9, "54,322"), (float("nan"), "\N{EN DASH}"), (float("inf"), "∞"),
        ((0.1, 0.25), "0.100, 0.250"), ("a<b", "a&lt;b"),
    ],
)  # fmt: skip
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


def test_report_names_the_mistake() -> None:
    with pytest.raises(ValueError, match="row 2 of table 'T' has 1 cells, the header 2"):
        render("t", [], [Section("s", tables=[("T", ["a", "b"], [[1, 2], [3]])])], {})
    for wrong in (b"no picture", b"", "text"):
        with pytest.raises(ValueError, match="figure 'F' is no PNG file"):
            render("t", [], [Section("s", figures=[("F", wrong)])], {})  # type: ignore[list-item]
