"""Input attribution through captum and shap, and how far it can be trusted.

``attribute`` gives every channel and patch (or sample) its share of the output against a baseline
that is always named. Deletion and insertion curves, agreement with causal patching and a surrogate
that may refuse to explain say what the shares are worth. captum and shap are imported when a method
of theirs is called.
"""

from tstlens.probing.attribution.agreement import AttributionAgreement
from tstlens.probing.attribution.compute import METHODS, attribute
from tstlens.probing.attribution.deletion import deletion_insertion
from tstlens.probing.attribution.deletion_result import DeletionInsertion
from tstlens.probing.attribution.difference import prediction_difference
from tstlens.probing.attribution.result import InputAttribution
from tstlens.probing.attribution.surrogates import Surrogate, surrogate

__all__ = [
    "METHODS",
    "AttributionAgreement",
    "DeletionInsertion",
    "InputAttribution",
    "Surrogate",
    "attribute",
    "deletion_insertion",
    "prediction_difference",
    "surrogate",
]
