"""``draw``: one name for the figure of any result."""

from __future__ import annotations

import importlib
from functools import singledispatch
from typing import Any

import plotly.graph_objects as go

from tstlens.errors import ArgumentError

# Results of rooms that need an extra (sae-lens): their drawings are imported when one comes.
_LATER = {
    "tstlens.saes": (
        "tstlens.figures.features",
        "tstlens.figures.feature_graph",
        "tstlens.figures.dictionaries",
        "tstlens.figures.browser.write",
    ),
    "tstlens.codebooks": (
        "tstlens.figures.code_effects",
        "tstlens.figures.codebooks",
        "tstlens.figures.code_browser.write",
        "tstlens.figures.regime",
    ),
}


def joined_later(result: object) -> bool:
    """Import what draws this kind of result, where that waits for the first one; did it join?"""
    waiting = [room for room in _LATER if type(result).__module__.startswith(room + ".")]
    for room in waiting:
        for module in _LATER.pop(room):
            importlib.import_module(module)
    return bool(waiting)


@singledispatch
def draw(result: object, **options: Any) -> go.Figure:
    """The figure of a result, chosen by its type.

    Args:
        result: what an analysis returned.
        **options: of that kind of drawing; see :func:`tstlens.figures.draw_sweep` for sweeps.

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
