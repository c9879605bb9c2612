"""Probes, clusters, similarity, steering and input attribution: what activations hold.

Every analysis stands beside its control: shuffled labels, random clusters, random directions,
random orders. Names resolve when they are first used, so that importing this package loads neither
scikit-learn nor captum nor shap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tstlens.probing.attribution.agreement import AttributionAgreement
    from tstlens.probing.attribution.compute import attribute
    from tstlens.probing.attribution.deletion import deletion_insertion
    from tstlens.probing.attribution.deletion_result import DeletionInsertion
    from tstlens.probing.attribution.difference import prediction_difference
    from tstlens.probing.attribution.result import InputAttribution
    from tstlens.probing.attribution.surrogates import Surrogate, surrogate
    from tstlens.probing.clusters_effect import ClusterEffect, cluster_effect
    from tstlens.probing.clusters_fit import clusters
    from tstlens.probing.clusters_result import Clusters
    from tstlens.probing.directions import Direction, direction, latent_direction, random_directions
    from tstlens.probing.extraction import Activations, activations
    from tstlens.probing.probes import probe
    from tstlens.probing.probes_result import ProbeResult
    from tstlens.probing.separability_map import Separability, separability
    from tstlens.probing.similarity_cka import Similarity, cka, similarity
    from tstlens.probing.similarity_skipping import SkipCost, skip_cost
    from tstlens.probing.steering_dose import DoseResponse, dose_response
    from tstlens.probing.units_association import units
    from tstlens.probing.units_result import Units

__all__ = [
    "Activations",
    "AttributionAgreement",
    "ClusterEffect",
    "Clusters",
    "DeletionInsertion",
    "Direction",
    "DoseResponse",
    "InputAttribution",
    "ProbeResult",
    "Separability",
    "Similarity",
    "SkipCost",
    "Surrogate",
    "Units",
    "activations",
    "attribute",
    "cka",
    "cluster_effect",
    "clusters",
    "deletion_insertion",
    "direction",
    "dose_response",
    "latent_direction",
    "prediction_difference",
    "probe",
    "random_directions",
    "separability",
    "similarity",
    "skip_cost",
    "surrogate",
    "units",
]

# Public name -> the module of this folder that defines it. No module may be called like a public
# name: importing it would put the module in the name's place.
_HOME = {
    "Activations": "extraction",
    "AttributionAgreement": "attribution.agreement",
    "ClusterEffect": "clusters_effect",
    "Clusters": "clusters_result",
    "DeletionInsertion": "attribution.deletion_result",
    "Direction": "directions",
    "DoseResponse": "steering_dose",
    "InputAttribution": "attribution.result",
    "ProbeResult": "probes_result",
    "Separability": "separability_map",
    "Similarity": "similarity_cka",
    "SkipCost": "similarity_skipping",
    "Surrogate": "attribution.surrogates",
    "Units": "units_result",
    "activations": "extraction",
    "attribute": "attribution.compute",
    "cka": "similarity_cka",
    "cluster_effect": "clusters_effect",
    "clusters": "clusters_fit",
    "deletion_insertion": "attribution.deletion",
    "direction": "directions",
    "dose_response": "steering_dose",
    "latent_direction": "directions",
    "prediction_difference": "attribution.difference",
    "probe": "probes",
    "random_directions": "directions",
    "separability": "separability_map",
    "similarity": "similarity_cka",
    "skip_cost": "similarity_skipping",
    "surrogate": "attribution.surrogates",
    "units": "units_association",
}

# Hidden from type checkers, which would take it to mean that every name exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what ``name`` stands for, once: the result is kept as an ordinary attribute."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
