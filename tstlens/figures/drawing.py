"""``draw``: one name for the figure of any result; figures as images, in files and notebooks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from functools import singledispatch
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from tstlens.arguments import Count, checked
from tstlens.errors import ArgumentError
from tstlens.storage import write_bytes

# Rooms that need an extra (sae-lens), or stand after this one: their drawings are imported when a
# result of theirs comes.
_LATER = {
    "tstlens.saes": ("tstlens.figures.features", "tstlens.figures.browser.pages"),
    "tstlens.codebooks": ("tstlens.figures.codebooks", "tstlens.figures.browser.codes"),
    "tstlens.truth": ("tstlens.truth.figures",),
    "tstlens.truth.regime_codebooks": ("tstlens.truth.dictionary_figures",),
    "tstlens.truth.sae_recovery": ("tstlens.truth.dictionary_figures",),
}


def joined_later(result: object) -> bool:
    """Import what draws this kind of result, where that waits for the first one; did it join?"""
    waiting = [room for room in _LATER if f"{type(result).__module__}.".startswith(f"{room}.")]
    for room in waiting:
        for module in _LATER.pop(room):
            importlib.import_module(module)
    return bool(waiting)


@singledispatch
def draw(result: object, **options: Any) -> go.Figure:
    """The figure of a result, chosen by its type.

    Args:
        result: what an analysis returned.
        **options: of that kind of drawing, ``title`` among them for all: "" for one made from the
            result, None for none. ``help(figures.draw.dispatch(type(result)))`` lists the others.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: there is no drawing for this type.

    Example:
        >>> from tstlens import figures
        >>> from tstlens.patching import SweepResult
        >>> figures.draw.dispatch(SweepResult).__name__
        'draw_sweep'
    """
    if joined_later(result):
        return draw(result, **options)
    known = sorted(kind.__name__ for kind in draw.registry if kind is not object)
    raise ArgumentError(
        f"expected a result of {', '.join(known)}, got {type(result).__name__}; a result type "
        "joins with @tstlens.figures.draw.register"
    )


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


_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@checked
def in_notebooks(width: Count = 900) -> str:
    """Store every figure of a notebook as an interactive one and, if possible, as an image too.

    Code hosts show a notebook's images but do not run plotly. Images are drawn by kaleido with a
    Chrome or Chromium that is installed already (or named by ``BROWSER_PATH``); without one only
    the interactive figure is stored, and so it is where ``TSTLENS_NO_IMAGES`` is set.

    Args:
        width: of the image, pixels; its height is the figure's own.

    Returns:
        The name of the plotly renderer that is now the default.
    """
    can_draw = importlib.util.find_spec("kaleido") is not None and not os.environ.get(
        "TSTLENS_NO_IMAGES"
    )
    can_draw = can_draw and (
        os.environ.get("BROWSER_PATH") or any(shutil.which(name) for name in _BROWSERS)
    )
    if can_draw:
        image = pio.renderers["png"]
        image.width, image.height, image.scale = width, None, 1.5
    pio.renderers.default = "plotly_mimetype+png" if can_draw else "plotly_mimetype"
    return str(pio.renderers.default)
