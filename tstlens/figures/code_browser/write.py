"""The browser page of a model's codes, written atomically."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from tstlens.codebooks.index import CodeIndex
from tstlens.codebooks.notes import CodeNotes
from tstlens.codebooks.search_result import CodeSearch
from tstlens.errors import ArgumentError, StorageError
from tstlens.figures.browser.pack import embedded
from tstlens.figures.browser.page import page
from tstlens.figures.browser.write import HERE as SHARED
from tstlens.figures.code_browser.payload import payload
from tstlens.storage import write_text

HERE = Path(__file__).parent
SCRIPTS = (
    SHARED / "data.js",
    SHARED / "charts.js",
    SHARED / "rows.js",
    HERE / "notes.js",
    HERE / "codes.js",
    HERE / "code.js",
)
STYLES = (SHARED / "page.css", HERE / "codes.css")


@page.register
def write_codes(
    index: CodeIndex,
    path: str | Path,
    *,
    notes: CodeNotes | str | Path | None = None,
    searches: Mapping[str, CodeSearch] | None = None,
    title: str | None = None,
    n_windows: int = 9,
    seed: int = 0,
) -> Path:
    """Write a page on which every code can be looked up, sorted, searched, seen and noted on.

    The page holds a table of all codes and the searches; a click opens a code: its prototype, its
    windows on the raw series, the classes it is active in, the searches that found it, a map of
    where it is active, the properties that it follows, the codes like it and a note. Everything is
    inside the file; it asks for nothing from anywhere. Of large data sets a sample of the series is
    shown, as the page says; its numbers are those of all.

    Args:
        index: what :meth:`tstlens.codebooks.CodeIndex.build` returned.
        path: the file to write; its folder is made if missing.
        notes: notes on codes, or a file of them that the page or :class:`CodeNotes` wrote.
        searches: name -> search, to show; one per class where None.
        title: heading of the page; the model and the data where None.
        n_windows: windows per code.
        seed: of the sample of series, and of the searches per class.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written; no notes there.
        ArgumentError: n_windows below 1.
    """
    if isinstance(n_windows, bool) or not isinstance(n_windows, int) or n_windows < 1:
        raise ArgumentError(f"expected n_windows of at least 1, got {n_windows!r}")
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    given = notes if isinstance(notes, CodeNotes) else CodeNotes()
    if isinstance(notes, str | Path):
        given = CodeNotes.load(notes)
    content = payload(index, given, searches, n_windows, seed)
    model = index.made.get("model")
    about = title or (f"Codes of {model}" if model else "Codes")
    return write_text(path, render(content, about))


def render(content: dict, title: str) -> str:
    """The page as text."""
    parts = {
        "title": html.escape(title),
        "style": "\n".join(one.read_text(encoding="utf-8") for one in STYLES),
        "data": embedded({**content, "title": title}),
        "script": "\n".join(one.read_text(encoding="utf-8") for one in SCRIPTS),
    }
    text = (HERE / "codes.html").read_text(encoding="utf-8")
    for name in ("title", "style", "script", "data"):  # data last: it may hold any text
        text = text.replace(f"[[{name}]]", parts[name])
    return text
