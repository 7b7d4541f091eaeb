"""Figures and tables in HTML pages that need no other file."""

import html
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from memattn._tables import Table
from memattn.files import write_text

# stands for the colour of text, of which a light and a dark page each have their own
INK = "#010203"
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; overflow-x: auto; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; border-bottom: 1px solid #8886; }
th:first-child, td:first-child { text-align: left; } caption { text-align: left; }
"""


def write_figures(
    figures: Mapping[str, Figure | Table], path: str | Path, *, title: str = ""
) -> None:
    """Write figures into one HTML page with a light and a dark theme; the file is whole or absent.

    Args:
        figures: The figures, and tables, by their headings; an empty heading is left out.
        path: The page to write.
        title: Title of the page.
    """
    parts = [
        (f"<h2>{html.escape(heading)}</h2>" if heading else "")
        + f"<figure>{to_html(figure) if isinstance(figure, Table) else to_svg(figure)}</figure>"
        for heading, figure in figures.items()
    ]
    name = html.escape(title)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    heading = f"<h1>{name}</h1>" if name else ""
    body = f"<main>{''.join([heading, *parts])}</main>"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    write_text(Path(path), page)


def to_html(table: Table) -> str:
    """The table as HTML, under its title."""
    row = lambda cells, kind: "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells)
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    head = f"<caption>{html.escape(table.title)}</caption><tr>{row(table.heads, 'th')}</tr>"
    return f"<table>{head}{body}</table>"


def to_svg(figure: Figure) -> str:
    """The figure as SVG for an HTML page, whose text and axes take the colour of the page's text.

    Axes, ticks and labels become ``currentColor`` and the background transparent, so that one
    picture suits a light and a dark page. Identifiers are hashed from the content, the same for
    the same figure.
    """
    for name in ("_suptitle", "_supxlabel", "_supylabel"):
        if (text := getattr(figure, name, None)) is not None:
            text.set_color(INK)
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK, which="both")
        for spine in axes.spines.values():
            spine.set_edgecolor(INK)
        texts: list[Any] = [axes.title, axes.xaxis.label, axes.yaxis.label]
        legend = axes.get_legend()
        if legend is not None:
            texts += legend.get_texts()
        for text in texts:
            text.set_color(INK)
    figure.set_facecolor("none")
    content = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "memattn"}):
        FigureCanvasSVG(figure)
        figure.savefig(content, format="svg", metadata={"Date": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # a page scales it to the width that there is
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg, count=1)
