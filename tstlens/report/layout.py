"""Blocks of the page: a heading, paragraphs, figures and tables with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["toImage"]],
    "displayModeBar": "hover",
    "showSendToCloud": False,
}


def html_of(figure: go.Figure, name: str) -> Markup:
    """A figure as a div of its own height and the page's width."""
    layout: Any = figure.layout
    div = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"fig-{name}",
        config=CONFIG,
        default_width="100%",
        default_height=f"{layout.height}px",
    )
    return Markup(div)


def block(heading: str, drawn: Sequence[tuple[go.Figure, str, str]], key: str) -> dict[str, Any]:
    """A block of figures, each with its name and caption."""
    return {
        "heading": heading,
        "id": None,
        "lines": [],
        "items": [figure_of(figure, f"{key}-{name}", caption) for figure, name, caption in drawn],
        "details": None,
    }


def figure_of(figure: go.Figure, name: str, caption: str, wide: bool = False) -> dict[str, Any]:
    """A figure with its caption, over the page's whole width where ``wide``."""
    return {"html": html_of(figure, name), "caption": caption, "wide": wide, "table": None}


def table_of(
    columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", texts: int = 1
) -> dict[str, Any]:
    """A table; its first ``texts`` columns are text, the others numbers."""
    table = {"columns": list(columns), "rows": [list(row) for row in rows], "texts": texts}
    return {"html": None, "caption": caption, "wide": False, "table": table}


def lines_of(lines: Sequence[str]) -> dict[str, Any]:
    """Paragraphs beside a figure."""
    return {"html": None, "caption": "", "wide": False, "table": None, "lines": list(lines)}
