"""Classification data sets by name, through aeon.

The sets inside aeon's wheel (ArrowHead, BasicMotions, GunPoint, ItalyPowerDemand, JapaneseVowels
and a few more) need no network; others are downloaded by aeon into its own cache (``AEON_DATA``,
by default ``~/aeon_data``). What the archives call an equal-length version is not one procedure:
JapaneseVowels was resampled to 25 samples, PickupGestureWiimoteZ was filled up with low noise.

The data that a checkpoint was made from, as its ``info`` names them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tstlens.arguments import checked
from tstlens.data.labels import as_class_names
from tstlens.data.scaling import KINDS, Scaling
from tstlens.data.series import TimeSeriesData
from tstlens.data.ts_file import TsFile, read_ts
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    DownloadError,
    SeriesValueError,
    UnknownDatasetError,
)

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
        ArgumentError: another split or scaling, no equal-length version, a regression or
            forecasting set, or time stamps that are not evenly spaced.
        CorruptFileError: a file without series, or a line that is not what its header says.
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
    # Both, whichever is asked for: classes and the padded length are those of the data set.
    read = {part: _read_split(name, part, equal_length, folder) for part in ("train", "test")}
    class_names = as_class_names(label for file in read.values() for label in file.class_names)
    chosen = [read[part] for part in parts]
    arrays = [array for file in chosen for array in file.arrays]
    labelled = all(file.labels is not None for file in chosen)
    labels = [label for file in chosen for label in file.labels or ()] if labelled else None
    n_time = max(array.shape[1] for array in arrays)
    if equal_length:
        _refuse_unequal(name, arrays)
    else:
        n_time = max(array.shape[1] for file in read.values() for array in file.arrays)
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
    labels: list[str] | None,
    class_names: tuple[str, ...],
    n_time: int,
) -> TimeSeriesData:
    try:
        return TimeSeriesData.from_arrays(
            arrays, labels, class_names=class_names, n_time=n_time, name=name, split=split
        )
    except SeriesValueError as error:
        if "got NaN" not in str(error):
            raise SeriesValueError(f"{name}: {error}") from error
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


def _read_split(name: str, split: str, equal_length: bool, folder: str | None) -> TsFile:
    if folder is None and not _is_cached(name):
        _download(name, split, equal_length)
    held = (Path(folder) if folder else _cache_folder()) / _base(name)
    names = [f"{name}_eq", name] if equal_length else [name]
    paths = [held / f"{stem}_{split.upper()}.ts" for stem in names]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise CorruptFileError(f"expected {paths[-1].name} in {held}, found none")
    try:
        return read_ts(path)
    except CorruptFileError as error:
        raise CorruptFileError(f"the {split} file of {name} could not be read: {error}") from error


def _download(name: str, split: str, equal_length: bool) -> None:
    from aeon.datasets import load_classification

    try:
        load_classification(name, split=split, load_equal_length=equal_length)
    except Exception as error:
        if _is_cached(name):
            return  # fetched, and read here by other means
        raise DownloadError(
            f"{name} is not on this disk and could not be downloaded: {error}. Go online, "
            f"or put {name}_TRAIN.ts and {name}_TEST.ts into {_cache_folder() / _base(name)}; "
            f"offline there are {', '.join(_bundled_names())}"
        ) from error


def _find_folder(name: str) -> str | None:
    # Naming the wheel's folder spares aeon from creating its cache for data that it ships.
    from aeon.datasets.tsc_datasets import tsc_zenodo

    base, bundled = _base(name), _bundled_names()
    if _holds_series(_wheel_folder() / base, base):
        return str(_wheel_folder())
    if base in tsc_zenodo or _is_cached(base):
        return None
    alone = _wheel_folder() / base / f"{base}.csv"
    if alone.is_file():
        raise ArgumentError(
            f"{name} is one long series for forecasting, without classes: "
            f"pandas.read_csv({str(alone)!r}) reads it, ForecastWindows cuts windows from it"
        )
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
