"""The browser page of a dictionary's latents, written atomically."""

from __future__ import annotations

import html
from pathlib import Path

from tstlens.errors import ArgumentError, StorageError
from tstlens.figures.browser.pack import embedded
from tstlens.figures.browser.page import page
from tstlens.figures.browser.payload import payload
from tstlens.saes.reading.result import Features
from tstlens.storage import write_text

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "charts.js", "rows.js", "table.js", "latent.js", "main.js")


@page.register
def write_features(
    features: Features,
    path: str | Path,
    *,
    title: str | None = None,
    n_windows: int = 9,
    seed: int = 0,
) -> Path:
    """Write a page on which every latent can be looked up, sorted, searched and seen.

    The page holds a table of all latents; a click opens one: its strongest windows on the raw
    series, the classes it is active in, a map of its activation over series and time, what its
    removal does to the output, the properties that it follows and its nearest latents. Everything
    is inside the file; it asks for nothing from anywhere. Of data sets with more than 6 million
    samples (or 2 million activations) a sample of the series is shown, as the page says; the
    numbers in its tables are those of all.

    Args:
        features: what :func:`tstlens.saes.features` returned.
        path: the file to write; its folder is made if missing.
        title: heading of the page; the hook and the data where None.
        n_windows: strongest windows per latent.
        seed: of the sample of series, where not all fit.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written.
        ArgumentError: n_windows below 1.

    Example:
        >>> from tstlens import saes
        >>> saes.features(model, sae, data).to_html("features.html")  # doctest: +SKIP
    """
    if isinstance(n_windows, bool) or not isinstance(n_windows, int) or n_windows < 1:
        raise ArgumentError(f"expected n_windows of at least 1, got {n_windows!r}")
    path = Path(path)
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    about = title or f"{features.name} latents of {features.hook}"
    text = render(payload(features, n_windows, seed), about)
    return write_text(path, text)


def render(content: dict, title: str) -> str:
    """The page as text."""
    parts = {
        "title": html.escape(title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "data": embedded({**content, "title": title}),
        "script": "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name in ("title", "style", "script", "data"):  # data last: it may hold any text
        text = text.replace(f"[[{name}]]", parts[name])
    return text
