"""Probes, clusters, similarity, steering and input attribution: what activations hold.

Every analysis stands beside its control: shuffled labels, random clusters, random directions,
random orders. Names resolve when they are first used, so that importing this package loads neither
scikit-learn nor captum nor shap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tstlens.lazy import lazy

if TYPE_CHECKING:
    from tstlens.model.activations import Activations, activations
    from tstlens.probing.clustering import ClusterEffect, Clusters, cluster_effect, clusters
    from tstlens.probing.deletion import (
        DeletionConfig,
        DeletionInsertion,
        deletion_insertion,
        prediction_difference,
    )
    from tstlens.probing.explanations import AttributionAgreement
    from tstlens.probing.input_attribution import AttributionConfig, InputAttribution, attribute
    from tstlens.probing.layer_similarity import Similarity, SkipCost, cka, similarity, skip_cost
    from tstlens.probing.probes import ProbeConfig, ProbeResult, probe
    from tstlens.probing.separability_map import Separability, separability
    from tstlens.probing.steering import (
        Direction,
        DoseResponse,
        direction,
        dose_response,
        latent_direction,
        random_directions,
    )
    from tstlens.probing.surrogates import Surrogate, surrogate
    from tstlens.probing.unit_association import Units, units
    from tstlens.probing.unit_matching import UnitMatch, match_units

__all__ = [
    "Activations",
    "AttributionAgreement",
    "AttributionConfig",
    "ClusterEffect",
    "Clusters",
    "DeletionConfig",
    "DeletionInsertion",
    "Direction",
    "DoseResponse",
    "InputAttribution",
    "ProbeConfig",
    "ProbeResult",
    "Separability",
    "Similarity",
    "SkipCost",
    "Surrogate",
    "UnitMatch",
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
    "match_units",
    "prediction_difference",
    "probe",
    "random_directions",
    "separability",
    "similarity",
    "skip_cost",
    "surrogate",
    "units",
]

if not TYPE_CHECKING:  # a type checker would take it to mean that every name exists
    __getattr__, __dir__ = lazy(__name__)
