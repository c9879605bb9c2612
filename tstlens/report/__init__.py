"""Accounts of a model for people: the HTML report, the card of a checkpoint, the suite."""

from __future__ import annotations

from tstlens.report.build import build
from tstlens.report.card import model_card
from tstlens.report.checkpoint import make_checkpoint
from tstlens.report.forecast_checkpoint import forecast_card, make_forecast_checkpoint
from tstlens.report.suite import Truth, truth

__all__ = [
    "Truth",
    "build",
    "forecast_card",
    "make_checkpoint",
    "make_forecast_checkpoint",
    "model_card",
    "truth",
]
