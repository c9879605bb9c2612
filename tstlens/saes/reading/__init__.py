"""Reading a dictionary: what each latent of an SAE (or code of a codebook) stands for.

A *dictionary* is anything with ``encode(x) -> [..., latent]``, ``decode(latents) -> x`` and
``cfg.metadata.hook_name``. Everything after the encoder works on its :class:`Activity`, the
activations of every latent over (series, channel, position), so codebooks are read the same way.
"""

from __future__ import annotations

from tstlens.saes.reading.activity import Activity, Window, Windows, activity_of
from tstlens.saes.reading.build import features
from tstlens.saes.reading.intervention import (
    LatentEffect,
    OutputEffects,
    ablate_latent,
    output_effects,
    steer_latent,
)
from tstlens.saes.reading.matching import DictionaryMatch, compare
from tstlens.saes.reading.result import (
    ClassAssociation,
    Features,
    PropertyAssociation,
    class_association,
    property_association,
)

__all__ = [
    "Activity",
    "ClassAssociation",
    "DictionaryMatch",
    "Features",
    "LatentEffect",
    "OutputEffects",
    "PropertyAssociation",
    "Window",
    "Windows",
    "ablate_latent",
    "activity_of",
    "class_association",
    "compare",
    "features",
    "output_effects",
    "property_association",
    "steer_latent",
]
