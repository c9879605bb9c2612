"""Models that run every series twice, as it is and mirrored (TimesFM 2.5, ``both_signs``).

Both passes are rows of one run. What only computes on activations takes both, as a dictionary that
is spliced in meets both: streams, training and scores of SAEs and codebooks, patching. What says
where in a series an activation comes from, what it is of, or which way it moves the output refuses
such a model: a mirrored row is of no stretch of the series as given, and its share of the forecast
counts with its sign turned back, so that an edit of both passes works against itself.
"""

from __future__ import annotations

from typing import Any

from tstlens.errors import ArgumentError


def require_one_pass(model: Any, what: str) -> None:
    """Raise :class:`ArgumentError` for a model whose rows hold mirrored series too.

    Args:
        model: the model.
        what: what cannot be done, such as "to read its features".
    """
    if model.cfg.n_passes > 1:
        raise ArgumentError(
            "this model's trunk holds every channel and its mirror image, and an activation of the "
            "mirror image has no place in the series as given: convert the source with "
            f"both_signs=False {what}. Its first pass and weights are the same, so SAEs and "
            "codebooks of one model fit the other"
        )
