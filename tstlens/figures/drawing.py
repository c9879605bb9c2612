"""``draw``: one name for the figure of any result."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import plotly.graph_objects as go

from tstlens.errors import ArgumentError


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
    known = sorted(kind.__name__ for kind in draw.registry if kind is not object)
    raise ArgumentError(
        f"expected a result of {', '.join(known)}, got {type(result).__name__}; a result type "
        "joins with @tstlens.figures.draw.register"
    )
