"""Every method of the library against answers that are known: see :func:`tstlens.report.truth`."""

from __future__ import annotations

from tstlens.report.suite.build import QUESTIONS, SETTINGS, Truth, truth
from tstlens.report.suite.components import component_scores
from tstlens.report.suite.features import feature_scores
from tstlens.report.suite.states import state_scores
from tstlens.report.suite.where import where_scores

__all__ = [
    "QUESTIONS",
    "SETTINGS",
    "Truth",
    "component_scores",
    "feature_scores",
    "state_scores",
    "truth",
    "where_scores",
]
