"""Pages: a result as one self-contained HTML file that is read in a browser, without a network.

``page(result, path)`` chooses by the kind of result, as ``draw`` does for figures;
``result.to_html(path)`` calls it.
"""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from tstlens.errors import ArgumentError
from tstlens.figures.drawing import joined_later

__all__ = ["page"]


@singledispatch
def page(result: object, path: str | Path, **options: Any) -> Path:
    """Write the HTML page of a result, chosen by its type.

    Args:
        result: what an analysis returned.
        path: the file to write, atomically.
        **options: of that kind of page; see :func:`tstlens.figures.browser.pages.write_features`.

    Returns:
        The path.

    Raises:
        ArgumentError: there is no page for this type.

    Example:
        >>> from tstlens.figures import page
        >>> page(1.5, "x.html")
        Traceback (most recent call last):
        tstlens.errors.ArgumentError: expected a result with a page, got float
    """
    if joined_later(result):
        return page(result, path, **options)
    raise ArgumentError(f"expected a result with a page, got {type(result).__name__}")
