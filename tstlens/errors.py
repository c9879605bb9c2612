"""The exceptions of tstlens, in one small tree.

::

    TstlensError
    ├── InputError (ValueError)             what you passed does not fit
    │   ├── SeriesShapeError                axes, channel count or length of a series
    │   ├── SeriesValueError                NaN, infinity, or a dtype that is not floating
    │   ├── LabelError                      a label or target outside the model's classes
    │   └── ArgumentError                   any other argument: the message names it
    │       └── RowIndexError (IndexError)  data[index] outside the rows, or with what is no index
    ├── UnknownNameError (LookupError)      a name that nothing goes by; lists what does
    │   ├── UnknownDatasetError
    │   ├── UnknownCheckpointError
    │   ├── UnknownFamilyError
    │   ├── UnknownSiteError
    │   ├── UnknownAxisError
    │   ├── UnknownHookError (KeyError)
    │   └── UnknownActivationError (KeyError)
    ├── HookError (AssertionError)          a hook that exists but cannot fire as things are set
    ├── NonlinearResidualError              a method that needs a residual stream that adds up
    ├── ConversionError
    │   ├── UnsupportedSourceError          a known source with an option that is not covered
    │   ├── SourcePackageError              the source's own package is not installed
    │   ├── StateDictError                  missing, extra or misshapen weights
    │   └── ParityError                     the converted model does not match its source
    └── StorageError (OSError)
        ├── CorruptFileError                truncated, altered or half written
        ├── ConfigVersionError              written by a newer tstlens
        └── DownloadError                   something that is not on this disk could not be fetched

Every message says what was expected, what came, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class TstlensError(Exception):
    """Base of every error that tstlens raises on purpose."""


class InputError(TstlensError, ValueError):
    """What was passed does not fit what was asked for."""


class SeriesShapeError(InputError):
    """The axes, the channel count or the length of a series are not what the model takes."""


class SeriesValueError(InputError):
    """A series holds NaN or infinity, or is not floating point."""


class LabelError(InputError):
    """A label or target lies outside the model's classes."""


class ArgumentError(InputError):
    """An argument has a value that is not possible here."""


class RowIndexError(ArgumentError, IndexError):
    """An index of series or pairs lies outside the rows, or is not an index of rows."""


class UnknownNameError(TstlensError, LookupError):
    """Nothing goes by this name.

    Args:
        name: the name that was asked for.
        known: the names that would have worked; the closest one is suggested.
        advice: one more sentence on what to do.
    """

    kind = "name"
    most = 40  # names that a message prints; of more than these, the first ones
    only_closest = False  # of more than ``most``, the closest ones instead

    def __init__(self, name: object, known: Iterable[object] = (), advice: str = "") -> None:
        self.name = name
        self.known = [str(entry) for entry in known]
        within = [entry for entry in self.known if entry.endswith(f".{name}")]  # "hook_z"
        close = within or difflib.get_close_matches(str(name), self.known, n=1, cutoff=0.6)
        message = f"unknown {self.kind} {name!r}"
        if close:
            message += f"; did you mean {close[0]!r}?"
        if self.known:
            label, shown = "known", self.known[: self.most]
            if self.only_closest and len(self.known) > self.most:
                label = "closest"
                shown = difflib.get_close_matches(str(name), self.known, n=self.most, cutoff=0.0)
                shown = list(dict.fromkeys([*within, *shown]))[: self.most]
            more = len(self.known) - len(shown)
            message += f"{'' if close else ';'} {label}: {', '.join(shown)}"
            message += f" and {more} more" if more else ""
        if advice:
            message += f". {advice}"
        super().__init__(message)

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with the message as the name.
        return type(self).__new__, (type(self), *self.args), vars(self)


class UnknownDatasetError(UnknownNameError):
    """No data set of this name is in aeon's wheel or its archives."""

    kind = "data set"


class UnknownCheckpointError(UnknownNameError):
    """No shipped checkpoint, folder or hub repository of this name."""

    kind = "checkpoint"


class UnknownFamilyError(UnknownNameError):
    """No source family of this name is registered."""

    kind = "family"


class UnknownSiteError(UnknownNameError):
    """No patching site of this name exists on this model."""

    kind = "site"


class UnknownAxisError(UnknownNameError):
    """The site has no axis of this name."""

    kind = "axis"


class UnknownHookError(UnknownNameError, KeyError):
    """The model has no hook point of this name; TransformerLens raises a KeyError."""

    kind = "hook"
    most, only_closest = 5, True


class UnknownActivationError(UnknownNameError, KeyError):
    """The activation cache holds nothing of this name."""

    kind = "activation"
    most, only_closest = 5, True


class HookError(TstlensError, AssertionError):
    """The hook point exists but cannot fire as the model is set or called."""


class NonlinearResidualError(TstlensError):
    """The method adds up contributions to the residual stream, which this model does not keep."""


class ConversionError(TstlensError):
    """A source could not be converted."""


class UnsupportedSourceError(ConversionError):
    """The source is of a known family but uses an option that is not covered."""


class SourcePackageError(ConversionError):
    """The package that a source model comes from is needed and not installed."""


class StateDictError(ConversionError):
    """A state dict has missing, extra or misshapen entries."""


class ParityError(ConversionError):
    """The converted model's output differs from its source's by more than the tolerance."""


class StorageError(TstlensError, OSError):
    """Reading or writing a file failed."""


class CorruptFileError(StorageError):
    """A file is truncated, altered or half written."""


class ConfigVersionError(StorageError):
    """A file was written by a newer version of tstlens."""


class DownloadError(StorageError):
    """Something that is not on this disk could not be fetched."""
