"""Figures in notebooks that also show where JavaScript does not run."""

from __future__ import annotations

import importlib.util
import os
import shutil

import plotly.io as pio

from tstlens.arguments import checked

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@checked
def in_notebooks(width: int = 900) -> str:
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
