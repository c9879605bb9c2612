"""The data that a checkpoint was made from, as its ``info`` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tstlens.arguments import checked
from tstlens.data.loading import load_dataset
from tstlens.data.scaling import Scaling
from tstlens.data.series import TimeSeriesData
from tstlens.errors import ArgumentError


@checked
def load_described(described: Mapping[str, Any], split: str) -> TimeSeriesData:
    """A split of the data set that a checkpoint's ``info["data"]`` describes.

    Args:
        described: ``{"name": ..., "equal_length": True, "scaling": None | dict | str}``; a scaling
            dict holds the statistics that the model was trained with.
        split: "train" or "test".

    Raises:
        ArgumentError: no name.
        UnknownDatasetError, DownloadError: as :func:`tstlens.load_dataset`.

    Example:
        >>> load_described({"name": "ItalyPowerDemand"}, "train")
        TimeSeriesData('ItalyPowerDemand', 'train', n=67, channel=1, time=24, classes=2)
    """
    if not described.get("name"):
        raise ArgumentError(
            "the checkpoint does not say which data set it was trained on; name one with data= "
            "(on the command line: --data JapaneseVowels)"
        )
    scaling = described.get("scaling")
    if scaling is not None and not isinstance(scaling, str | Mapping):
        raise ArgumentError(
            f"expected scaling as a kind, a dict of statistics or None, got {scaling!r}"
        )
    data = load_dataset(
        str(described["name"]),
        split=split,
        equal_length=bool(described.get("equal_length", True)),
        scaling=scaling if isinstance(scaling, str) else None,
    )
    return Scaling.from_dict(scaling).apply(data) if isinstance(scaling, Mapping) else data
