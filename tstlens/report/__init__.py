"""Accounts of a model for people: the HTML report, the card of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy
from tstlens.report.build import build
from tstlens.report.card import forecast_card, make_checkpoint, make_forecast_checkpoint, model_card

__all__ = [
    "build",
    "forecast_card",
    "make_checkpoint",
    "make_forecast_checkpoint",
    "model_card",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__, dict.fromkeys(("Truth", "truth"), "tstlens.truth"))
