"""Classification data sets by name, through aeon.

The sets inside aeon's wheel (ArrowHead, BasicMotions, GunPoint, ItalyPowerDemand, JapaneseVowels
and a few more) need no network; others are downloaded by aeon into its own cache (``AEON_DATA``,
by default ``~/aeon_data``). What the archives call an equal-length version is not one procedure:
JapaneseVowels was resampled to 25 samples, PickupGestureWiimoteZ was filled up with low noise.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tstlens.arguments import checked
from tstlens.data.labels import as_class_names
from tstlens.data.scaling import KINDS, Scaling
from tstlens.data.series import TimeSeriesData
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    DownloadError,
    SeriesValueError,
    UnknownDatasetError,
)

__all__ = ["load_dataset"]

SPLITS = ("train", "test", "all")


@checked
def load_dataset(
    name: str,
    split: str = "test",
    equal_length: bool = True,
    scaling: str | None = None,
) -> TimeSeriesData:
    """A classification data set of the UCR and UEA archives, by its name in aeon.

    Classes are in numerical order where all labels are numbers, else alphabetical, and are the
    same in both splits. Series stay in the order of the file.

    Args:
        name: as aeon spells it; "X_nmv" takes the archives' version of X with imputed values.
        split: "train", "test", or "all" for train and then test.
        equal_length: take the archives' equal-length version where lengths differ. False: the
            series as recorded, padded at the end with zeros to the longest of both splits, with
            a mask.
        scaling: None leaves the values alone; "per_channel" scales with the statistics of the
            training split, whichever split is loaded; "per_series" scales each by itself.

    Returns:
        Series ``[n, channel, time]`` in float32 with labels 0..n_classes-1.

    Raises:
        UnknownDatasetError: aeon has no data set of this name.
        DownloadError: it is not on this disk and could not be fetched.
        ArgumentError: another split or scaling, or no equal-length version exists.
        SeriesValueError: the data set has missing values.

    Example:
        >>> load_dataset("JapaneseVowels")
        TimeSeriesData('JapaneseVowels', 'test', n=370, channel=12, time=25, classes=9)
    """
    if split not in SPLITS:
        raise ArgumentError(f"expected split in {list(SPLITS)}, got {split!r}")
    if scaling is not None and scaling not in KINDS:
        raise ArgumentError(f"expected scaling in {list(KINDS)} or None, got {scaling!r}")
    folder = _find_folder(name)
    parts = ("train", "test") if split == "all" else (split,)
    arrays: list[Any] = []
    labels: list[str] = []
    declared: list[str] = []
    for part in parts:
        series, raw, meta = _read_split(name, part, equal_length, folder)
        arrays += list(series)
        labels += raw.tolist()
        declared += meta["class_values"]
    if equal_length:
        _refuse_unequal(name, arrays)
    n_time = max(array.shape[1] for array in arrays)
    if not equal_length and split != "all":
        # A model made for the training split's length must also take the test split.
        other = "train" if split == "test" else "test"
        rest, _, _ = _read_split(name, other, equal_length, folder)
        n_time = max(n_time, *(array.shape[1] for array in rest))
    class_names = as_class_names([*declared, *labels])
    data = _assemble(name, split, arrays, labels, class_names, n_time)
    if scaling is None:
        return data
    train = data
    if scaling == "per_channel" and split != "train":
        train = load_dataset(name, "train", equal_length)
    return Scaling.fit(train, scaling).apply(data)


def _assemble(
    name: str,
    split: str,
    arrays: list[Any],
    labels: list[str],
    class_names: tuple[str, ...],
    n_time: int,
) -> TimeSeriesData:
    try:
        return TimeSeriesData.from_arrays(
            arrays, labels, class_names=class_names, n_time=n_time, name=name, split=split
        )
    except SeriesValueError as error:
        raise SeriesValueError(
            f"{name} has missing values: {error}; the archives' imputed version, where there is "
            f'one, is load_dataset("{name}_nmv")'
        ) from error


def _refuse_unequal(name: str, arrays: list[Any]) -> None:
    lengths = [array.shape[1] for array in arrays]
    if min(lengths) != max(lengths):
        raise ArgumentError(
            f"expected series of equal length, got {min(lengths)} to {max(lengths)} samples: "
            f"{name} has no equal-length version; use equal_length=False to get them padded, "
            "with a mask"
        )


def _read_split(
    name: str, split: str, equal_length: bool, folder: str | None
) -> tuple[Any, Any, dict[str, Any]]:
    from aeon.datasets import load_classification

    try:
        loaded: Any = load_classification(
            name,
            split=split,
            extract_path=folder,
            return_metadata=True,
            load_equal_length=equal_length,
        )
    except Exception as error:
        message = str(error)
        if "regression problem" in message:
            raise ArgumentError(
                f"expected a classification data set, got {name}, which has a regression target"
            ) from error
        if folder is None and not _is_cached(name):
            raise DownloadError(
                f"{name} is not on this disk and could not be downloaded: {message}. Go online, "
                f"or put {name}_TRAIN.ts and {name}_TEST.ts into {_cache_folder() / _base(name)}; "
                f"offline there are {', '.join(_bundled_names())}"
            ) from error
        raise CorruptFileError(f"the {split} file of {name} could not be read: {error}") from error
    return loaded


def _find_folder(name: str) -> str | None:
    # Naming the wheel's folder spares aeon from creating its cache for data that it ships.
    from aeon.datasets.tsc_datasets import tsc_zenodo

    base, bundled = _base(name), _bundled_names()
    if _holds_series(_wheel_folder() / base, base):
        return str(_wheel_folder())
    if base in tsc_zenodo or _is_cached(base):
        return None
    known = sorted({*tsc_zenodo, *bundled}, key=lambda entry: (entry not in bundled, entry))
    plain = {_plain(entry): entry for entry in known}
    spelled = plain.get(_plain(base))
    advice = "aeon.datasets.tsc_datasets lists all of them; those inside aeon's wheel come first"
    if spelled is not None:
        advice = f"aeon spells it {spelled!r}"
    raise UnknownDatasetError(name, known, advice)


def _base(name: str) -> str:
    # aeon's own suffixes: "X_nmv" without missing values, "X_eq" of equal length.
    return name.removesuffix("_nmv").removesuffix("_eq")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _wheel_folder() -> Path:
    import aeon.datasets

    return Path(aeon.datasets.__file__).parent / "data"


def _bundled_names() -> list[str]:
    from aeon.datasets.tser_datasets import tser_soton

    names = (folder.name for folder in _wheel_folder().iterdir())
    return sorted(
        name
        for name in names
        if name not in tser_soton and _holds_series(_wheel_folder() / name, name)
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("AEON_DATA", "~/aeon_data")).expanduser()


def _is_cached(name: str) -> bool:
    return _holds_series(_cache_folder() / _base(name), _base(name))


def _holds_series(folder: Path, name: str) -> bool:
    return all((folder / f"{name}_{part}.ts").is_file() for part in ("TRAIN", "TEST"))
