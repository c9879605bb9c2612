"""A figure as a PNG beside a page: for places that show images but run no plotly."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from tstlens.errors import ArgumentError
from tstlens.storage import write_bytes


def write_png(
    figure: go.Figure, path: str | Path, *, width: int | None = None, scale: float = 2.0
) -> Path:
    """Write a figure as a PNG, atomically.

    Args:
        figure: of plotly.
        path: the file.
        width: of the figure in pixels; None for its own.
        scale: pixels of the image per pixel of the figure.

    Raises:
        ArgumentError: kaleido, or the Chrome or Chromium that it draws with, is missing.
        StorageError: the file cannot be written.
    """
    try:
        content = figure.to_image(format="png", width=width, scale=scale)
    except (ValueError, RuntimeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArgumentError(
            "an image is drawn by kaleido with Chrome or Chromium, and one of them is missing or "
            "failed: pip install kaleido, install chromium, or ask for no images "
            f"({why})"
        ) from error
    return write_bytes(Path(path), content)
