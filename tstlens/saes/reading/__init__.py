"""Reading a dictionary: what each latent of an SAE (or code of a codebook) stands for.

A *dictionary* is anything with ``encode(x) -> [..., latent]``, ``decode(latents) -> x`` and
``cfg.metadata.hook_name``. Everything after the encoder works on its :class:`Activity`, the
activations of every latent over (series, channel, position), so codebooks are read the same way.
"""

from __future__ import annotations

from tstlens.saes.reading.activity import Activity, activity_of
from tstlens.saes.reading.association import ClassAssociation, class_association
from tstlens.saes.reading.build import features
from tstlens.saes.reading.effects import OutputEffects, output_effects
from tstlens.saes.reading.intervention import ablate_latent, steer_latent
from tstlens.saes.reading.latent_effect import LatentEffect
from tstlens.saes.reading.matching import DictionaryMatch, compare
from tstlens.saes.reading.properties import PropertyAssociation, property_association
from tstlens.saes.reading.result import Features
from tstlens.saes.reading.windows import Window, Windows

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
