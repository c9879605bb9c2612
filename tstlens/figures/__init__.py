"""Plotly figures from results; they never see a model.

``result.figure()`` and ``draw(result)`` choose by the kind of the result; results of other analyses
join with ``@draw.register``. Beside it: the series that a model read (``series``, ``pair``,
``forecast``), a classifier's errors (``confusion``) and the strongest sites (``ranking``).

Every figure is zero-centred where it shows a change, says the unit in its colour bar and gives
numbers on hover. Importing this package imports plotly.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from tstlens.figures import (  # noqa: F401 (they join ``draw``)
    attention,
    attribution,
    circuit,
    clusters,
    depth,
    histories,
    input_attribution,
    sweeps,
)
from tstlens.figures.browser import page
from tstlens.figures.calendar import calendar
from tstlens.figures.drawing import draw, in_notebooks
from tstlens.figures.forecasts import forecast
from tstlens.figures.lines import pair, series
from tstlens.figures.probes import confusion
from tstlens.figures.statistics import ranking
from tstlens.figures.style import TEMPLATE
from tstlens.lazy import lazy

__all__ = [
    "TEMPLATE",
    "calendar",
    "confusion",
    "draw",
    "forecast",
    "in_notebooks",
    "page",
    "pair",
    "ranking",
    "series",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    _moved, __dir__ = lazy(
        __name__,
        dict.fromkeys(("draw_truth", "planted_series"), "tstlens.truth")
        | dict.fromkeys(("Interval", "over_pairs"), "tstlens.patching"),
    )

    def __getattr__(name: str) -> object:
        drawings = {drawing.__name__: drawing for drawing in draw.registry.values()}
        if name not in drawings or name == "draw":
            return _moved(name)
        warnings.warn(
            f"tstlens.figures.{name} is result.figure() or tstlens.figures.draw(result) now; the "
            "old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return drawings[name]
