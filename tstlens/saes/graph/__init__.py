"""Sparse feature graphs: which latents of one layer act on the output through which of another."""

from __future__ import annotations

from tstlens.saes.graph.build import feature_graph
from tstlens.saes.graph.result import FeatureGraph, FeatureNode

__all__ = ["FeatureGraph", "FeatureNode", "feature_graph"]
