"""Edges between components, paths along them, and the circuits that they make up."""

from tstlens.patching.circuits.circuit import Circuit
from tstlens.patching.circuits.edges import EdgeEffects, edge_attribution, edge_sweep
from tstlens.patching.circuits.graph import ComponentGraph, Edge, Node, component_graph
from tstlens.patching.circuits.judging import (
    Completeness,
    Faithfulness,
    Minimality,
    Together,
    faithfulness,
)
from tstlens.patching.circuits.paths import follow_paths, path_patch

__all__ = [
    "Circuit",
    "Completeness",
    "ComponentGraph",
    "Edge",
    "EdgeEffects",
    "Faithfulness",
    "Minimality",
    "Node",
    "Together",
    "component_graph",
    "edge_attribution",
    "edge_sweep",
    "faithfulness",
    "follow_paths",
    "path_patch",
]
