"""``page``: one name for the HTML page of any result that has one."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path
from typing import Any

from tstlens.errors import ArgumentError


@singledispatch
def page(result: object, path: str | Path, **options: Any) -> Path:
    """Write the HTML page of a result, chosen by its type.

    Args:
        result: what an analysis returned.
        path: the file to write, atomically.
        **options: of that kind of page; see :func:`tstlens.figures.browser.write_features`.

    Returns:
        The path.

    Raises:
        ArgumentError: there is no page for this type.

    Example:
        >>> from tstlens.figures import page
        >>> page(1.5, "x.html")
        Traceback (most recent call last):
        tstlens.errors.ArgumentError: expected a result of Features, got float; it has no page
    """
    known = sorted(kind.__name__ for kind in page.registry if kind is not object)
    raise ArgumentError(
        f"expected a result of {', '.join(known)}, got {type(result).__name__}; it has no page"
    )
