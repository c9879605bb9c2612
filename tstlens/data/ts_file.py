"""The ``.ts`` text format of the UCR and UEA archives, read strictly.

Labels are kept as written, in lower case as aeon has them. What could be read in two ways is
refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tstlens.data.labels import indices_in
from tstlens.errors import ArgumentError, CorruptFileError

_FLAGS = ("timestamps", "missing", "univariate", "equallength", "classlabel", "targetlabel")


@dataclass(frozen=True)
class TsFile:
    """What a file holds.

    Args:
        arrays: one [channel, time] per series; NaN for ``?`` and ``NaN``.
        labels: one per series; None where the file says that it has none.
        class_names: of the rows, and of a header that names them all.
    """

    arrays: list[np.ndarray]
    labels: list[str] | None
    class_names: list[str]


def read_ts(path: Path) -> TsFile:
    """Read a ``.ts`` file.

    Raises:
        ArgumentError: a regression set, or time stamps that are not evenly spaced.
        CorruptFileError: no series, or a line that does not say what its header says.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path} could not be read: {error}") from error
    flags, names, rows = _header(path, lines)
    if flags.get("targetlabel"):
        raise ArgumentError(
            f"expected a classification data set, got {re.sub('_(TRAIN|TEST)$', '', path.stem)}, "
            "which has a regression target; read it with aeon.datasets.load_regression and give "
            "the series to TimeSeriesData"
        )
    labelled = flags.get("classlabel", True)
    arrays, labels = [], []
    for number, line in rows:
        try:
            parts = _stamped(line, labelled) if flags.get("timestamps") else line.split(":")
            if labelled:
                labels.append(parts.pop().strip())
                if not labels[-1]:
                    raise ValueError("expected a label after the last ':'")
            arrays.append(_channels(parts))
            if len(arrays[-1]) != len(arrays[0]):
                raise ValueError(f"{len(arrays[-1])} channels after {len(arrays[0])}")
            if flags.get("univariate") and len(arrays[-1]) > 1:
                raise ValueError(f"{len(arrays[-1])} channels where the header says univariate")
            if flags.get("equallength") and arrays[-1].shape != arrays[0].shape:
                raise ValueError("another length, where the header says equal lengths")
        except _UnevenError as error:
            raise ArgumentError(f"line {number} of {path}: {error}") from error
        except ValueError as error:
            raise CorruptFileError(f"line {number} of {path}: {error}") from error
    if not arrays:
        raise CorruptFileError(f"expected series after @data in {path}, found none")
    if None in indices_in(labels, names):  # names with spaces or commas came apart in the header
        names = []
    return TsFile(arrays, labels if labelled else None, names + labels)


def _header(
    path: Path, lines: list[str]
) -> tuple[dict[str, bool], list[str], list[tuple[int, str]]]:
    flags: dict[str, bool] = {}
    names: list[str] = []
    rows: list[tuple[int, str]] = []
    inside = False
    for number, line in enumerate(lines, 1):
        line = line.strip().lower()
        if not line or line.startswith(("#", "%")):
            continue
        if inside:
            rows.append((number, line))
            continue
        key, *values = line.removeprefix("@").split()
        if not line.startswith("@"):
            raise CorruptFileError(f"line {number} of {path}: expected an @ tag before @data")
        inside = key == "data"
        if key in _FLAGS:
            if not values or values[0] not in ("true", "false"):
                raise CorruptFileError(
                    f"line {number} of {path}: expected true or false for @{key}"
                )
            flags[key] = values[0] == "true"
        if key == "classlabel" and flags[key]:
            names = [name for value in values[1:] for name in value.split(",") if name]
    if not inside:
        raise CorruptFileError(f"expected an @data line in {path}, found none")
    return flags, names, rows


class _UnevenError(ValueError):
    pass


def _channels(parts: list[str]) -> np.ndarray:
    channels = [
        [float("nan") if entry.strip() == "?" else _number(entry) for entry in part.split(",")]
        for part in parts
    ]
    lengths = {len(channel) for channel in channels}
    if len(lengths) != 1:
        raise ValueError(f"expected channels of one length, got {sorted(lengths)}")
    return np.array(channels)


def _number(entry: str) -> float:
    if "_" in entry:  # Python's own, in no other program
        raise ValueError(f"expected a number, got {entry!r}")
    return float(entry)


_PAIR = re.compile(r"\s*\(([^,()]+),([^,()]+)\)\s*(,|$)")


def _stamped(line: str, labelled: bool) -> list[str]:
    """``(stamp,value),(stamp,value):…:label`` as values alone."""
    parts = re.split(r"(?<=\))\s*:", line)
    label = [parts.pop()] if labelled else []
    if not parts or any("(" in entry for entry in label):
        raise ValueError(f"expected (stamp,value) pairs and a label, got {line[:40]!r}")
    values, first = [], None
    for part in parts:
        stamps, numbers, at = [], [], 0
        while at < len(part):
            found = _PAIR.match(part, at)
            if found is None:
                raise ValueError(f"expected (stamp,value) pairs, got {part[at : at + 40]!r}")
            stamps.append(found[1].strip())
            numbers.append(found[2])
            at = found.end()
        _check_even(stamps)
        first = stamps if first is None else first
        if stamps != first:
            raise _UnevenError("channels of one series have other time stamps; align them first")
        values.append(",".join(numbers))
    return values + label


def _check_even(stamps: list[str]) -> None:
    try:
        when = np.array([float(stamp) for stamp in stamps])
    except ValueError:
        when = np.array([np.datetime64(re.sub(r"\s+", "T", s)) for s in stamps], "datetime64[ns]")
        when = when.astype("int64").astype(float)
    steps = np.diff(when)
    if len(steps) and not (steps[0] > 0 and np.allclose(steps, steps[0], rtol=1e-6, atol=0)):
        raise _UnevenError("the time stamps are not evenly spaced; resample the series first")
