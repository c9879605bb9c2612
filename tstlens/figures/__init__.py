"""Plotly figures from results; they never see a model.

``draw(result)`` chooses by the kind of result and its axes; ``result.figure()`` calls it. Results
of other analyses join with ``@draw.register``. Beside it: the series that a model read
(``series``, ``pair``), a classifier's errors (``confusion``) and the strongest sites (``ranking``).

Every figure is zero-centred where it shows a change, says the unit in its colour bar and gives
numbers on hover. Importing this package imports plotly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.figures.attention import draw_attention
from tstlens.figures.attribution import draw_logit_attribution
from tstlens.figures.browser import page
from tstlens.figures.circuit import (
    draw_circuit,
    draw_edge_effects,
    draw_faithfulness,
    draw_influence,
)
from tstlens.figures.clusters import draw_cluster_effect, draw_clusters
from tstlens.figures.depth import draw_lens, draw_similarity, draw_skip_cost
from tstlens.figures.drawing import draw, in_notebooks
from tstlens.figures.input_attribution import (
    draw_attribution_agreement,
    draw_deletion_insertion,
    draw_input_attribution,
    draw_surrogate,
)
from tstlens.figures.intervals import Interval, over_pairs
from tstlens.figures.lines import forecast, pair, series
from tstlens.figures.probes import (
    confusion,
    draw_direction,
    draw_dose_response,
    draw_probe,
    draw_separability,
    draw_units,
)
from tstlens.figures.statistics import (
    draw_ablation,
    draw_agreement,
    draw_campaign,
    draw_split_half,
    draw_summary,
    ranking,
)
from tstlens.figures.style import TEMPLATE
from tstlens.figures.sweeps import draw_sweep
from tstlens.lazy import lazy

__all__ = [
    "TEMPLATE",
    "Interval",
    "confusion",
    "draw",
    "draw_circuit",
    "draw_cluster_effect",
    "draw_clusters",
    "draw_edge_effects",
    "draw_faithfulness",
    "draw_logit_attribution",
    "draw_attribution_agreement",
    "draw_deletion_insertion",
    "draw_direction",
    "draw_dose_response",
    "draw_input_attribution",
    "draw_separability",
    "draw_surrogate",
    "draw_lens",
    "draw_attention",
    "draw_ablation",
    "draw_agreement",
    "draw_campaign",
    "draw_influence",
    "draw_probe",
    "draw_similarity",
    "draw_skip_cost",
    "draw_split_half",
    "draw_summary",
    "draw_sweep",
    "draw_units",
    "forecast",
    "in_notebooks",
    "over_pairs",
    "page",
    "pair",
    "ranking",
    "series",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(
        __name__, dict.fromkeys(("draw_truth", "planted_series"), "tstlens.truth")
    )
