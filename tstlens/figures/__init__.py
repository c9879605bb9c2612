"""Plotly figures from results; they never see a model.

``draw(result)`` chooses by the kind of result and its axes; ``result.figure()`` calls it. Results
of other analyses join with ``@draw.register``. Beside it: the series that a model read
(``series``, ``pair``), a classifier's errors (``confusion``) and the strongest sites (``ranking``).

Every figure is zero-centred where it shows a change, says the unit in its colour bar and gives
numbers on hover. Importing this package imports plotly.
"""

from __future__ import annotations

from tstlens.figures.agreement import draw_agreement
from tstlens.figures.attention import draw_attention
from tstlens.figures.attribution import draw_logit_attribution
from tstlens.figures.browser import page
from tstlens.figures.circuit import draw_circuit, draw_edge_effects
from tstlens.figures.clusters import draw_cluster_effect, draw_clusters
from tstlens.figures.confusion import confusion
from tstlens.figures.deletion import draw_deletion_insertion, draw_surrogate
from tstlens.figures.depth import draw_lens
from tstlens.figures.drawing import draw
from tstlens.figures.faithfulness import draw_faithfulness
from tstlens.figures.forecasts import forecast
from tstlens.figures.influence import draw_influence
from tstlens.figures.input_attribution import (
    draw_attribution_agreement,
    draw_input_attribution,
)
from tstlens.figures.intervals import Interval, over_pairs
from tstlens.figures.lines import pair, series
from tstlens.figures.notebook import in_notebooks
from tstlens.figures.planted import planted_series
from tstlens.figures.probes import draw_probe
from tstlens.figures.ranking import ranking
from tstlens.figures.similarity import draw_similarity, draw_skip_cost
from tstlens.figures.statistics import (
    draw_ablation,
    draw_campaign,
    draw_split_half,
    draw_summary,
)
from tstlens.figures.steering import draw_direction, draw_dose_response, draw_separability
from tstlens.figures.style import TEMPLATE
from tstlens.figures.sweeps import draw_sweep
from tstlens.figures.truth import draw_truth
from tstlens.figures.units import draw_units

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
    "draw_truth",
    "draw_units",
    "forecast",
    "in_notebooks",
    "over_pairs",
    "page",
    "pair",
    "planted_series",
    "ranking",
    "series",
]
