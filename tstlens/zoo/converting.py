"""``convert``: a source model in, a model with the same outputs and a hook on everything out.

Source models on disk and on the hub: weights, or folders found by their ``config.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tstlens import storage
from tstlens.arguments import checked
from tstlens.errors import (
    ArgumentError,
    CorruptFileError,
    ParityError,
    SourcePackageError,
    StateDictError,
    StorageError,
    TstlensError,
)
from tstlens.model import HookedTST
from tstlens.model.folders import find_checkpoint
from tstlens.randomness import seeded
from tstlens.zoo import registry
from tstlens.zoo.comparing import compare
from tstlens.zoo.parity import check_parity
from tstlens.zoo.registry import Built, Family, choose

CONFIG = "config.json"


def read_source(
    path: str | Path, family: str | None = None
) -> tuple[nn.Module | Mapping[str, Tensor], str | None]:
    """A source model from a path, and its family.

    Args:
        path: a file of weights (``.safetensors``, or what ``torch.load(weights_only=True)`` reads),
            or a folder or hub id with the ``config.json`` and the weights that the source's own
            ``save_pretrained`` wrote.
        family: which family to load as; by default the one that knows the config.

    Returns:
        A state dict and the family as given, or a live module and its family.

    Raises:
        StorageError: nothing is there, or a folder without ``config.json``.
        CorruptFileError: a file that is not what it should be.
        UnknownFamilyError: no family knows this config.
        SourcePackageError: the package that the source comes from is not installed.
    """
    if Path(path).is_file():
        return _read_weights(Path(path)), family
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise StorageError(
            f"expected a file of weights, a folder or a hub id (organisation/model), found nothing "
            f"at {path}"
        )
    folder = Path(path) if Path(path).is_dir() else find_checkpoint(path)
    config = _read_config(folder)
    with _foreign(folder / CONFIG, "is no config of a source model"):
        chosen = registry.family_reading(config, family)
    _check_layers(folder, config)
    try:
        with _foreign(folder, f"holds no {chosen.name!r} model that its package can load"):
            return chosen.load(folder), chosen.name  # type: ignore[misc]
    except ImportError as error:
        raise SourcePackageError(
            f"loading a {chosen.name!r} model needs the package that it comes from: {error}; "
            "install it, or convert the live model where it is installed"
        ) from error


@contextmanager
def _foreign(path: Path, fault: str) -> Iterator[None]:
    """A damaged or made-up source is a CorruptFileError; what we refuse is said as it is."""
    try:
        with storage.reading(path, fault, "fetch or save the source again"):
            try:
                yield
            except (TstlensError, ImportError) as error:
                raise _AsItIs(error) from error
    except CorruptFileError as error:
        if isinstance(error.__cause__, _AsItIs):
            raise error.__cause__.error from error.__cause__.error.__cause__
        raise


class _AsItIs(Exception):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def _check_layers(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise where a config says more layers, or wider ones, than its weights have numbers."""
    shapes: list[tuple[int, ...]] = []
    for path in sorted(folder.glob("*.safetensors")):
        shapes += storage.shapes_in(path).values()
    if not shapes:
        return
    most = {"layers": len(shapes), "width": sum(math.prod(shape) for shape in shapes)}
    entries = list(config.items())
    while entries:
        name, value = entries.pop()
        if isinstance(value, Mapping):
            entries += value.items()
        counted = "layers" if "layers" in str(name) else "width"
        known = re.search(r"layers|d_model|d_ff|d_kv|hidden|_dim$|heads|vocab_size", str(name))
        if known and type(value) is int and value > most[counted]:
            raise CorruptFileError(
                f"{folder / CONFIG} says {name}={value:,}, and the weights beside it have "
                f"{len(shapes)} tensors with {most['width']:,} numbers in all; fetch or save the "
                "source again"
            )


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    if not storage.regular(path):
        raise StorageError(
            f"expected {CONFIG} and weights in {folder}, found no {CONFIG}; for weights alone give "
            "the file and family="
        )
    config = storage.read_json(path, "a config: it holds no JSON object", "save it again")
    if config.get("format") == "tstlens":
        raise ArgumentError(
            f"{folder} holds a converted model already: HookedTST.from_pretrained('{folder}')"
        )
    return config


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    again = "save them again with torch.save(source.state_dict(), path)"
    with storage.reading(path, "holds no weights that can be loaded safely", again):
        if path.suffix == ".safetensors":
            weights: Any = load_file(path)
        else:
            storage.check_packed(path)
            weights = torch.load(path, weights_only=True, map_location="cpu")
    for wrapped in ("state_dict", "model_state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapped), Mapping):
            weights = weights[wrapped]
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise CorruptFileError(f"{path} holds no state dict: names and tensors were expected")
    return weights


@checked
@seeded(0)
def convert(
    source: nn.Module | Mapping[str, Tensor] | str | Path,
    family: str | None = None,
    **hints: Any,
) -> HookedTST:
    """Turn a time-series transformer into a :class:`HookedTST` with the same outputs.

    Weights are copied, never trained or approximated. The result is compared with the source on
    random, constant and (where the source takes masks) padded series, in float32 and float64; the
    report is ``model.parity``. The source is left as it was.

    Args:
        source: a live module; a state dict, or a file of one, together with ``family``; or a folder
            (or hub id) with a ``config.json``, for families that have such a format.
        family: which family to convert as; needed for a state dict. See :func:`families`.
        **hints: what the weights alone cannot tell (``n_heads`` for a state dict), or modules that
            belong to the model (``embed``, ``head`` and a series ``example`` of a bare
            ``torch.nn.TransformerEncoder``). docs/families.md lists them by family; the error for
            a hint that a family does not take names those that it takes.

    Returns:
        The converted model, in eval mode, with ``.parity`` set.

    Raises:
        StorageError, SourcePackageError: a path that holds no model, or one whose package is not
            installed.
        UnknownFamilyError: no family recognises the source, or ``family`` is not known.
        UnsupportedSourceError: the source uses an option that is not covered; it is named.
        StateDictError: entries are missing, left over or misshapen.
        ArgumentError: a hint is missing or not known to the family.
        ParityError: outputs differ by more than the tolerance.

    Example:
        >>> import tstlens
        >>> from tstlens.training import ConvTST
        >>> source = ConvTST(n_channels=2, n_time=30, n_classes=4)
        >>> model = tstlens.convert(source)
        >>> model.parity.passed
        True
    """
    if isinstance(source, str | Path):
        source, family = read_source(source, family)
    if isinstance(source, Mapping):
        for name, tensor in source.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise StateDictError(
                    f"expected a state dict of tensors by name, got {type(tensor).__name__} for "
                    f"{name!r}; try torch.as_tensor on arrays, and the inner dict of a nested one"
                )
    chosen = choose(source, family)
    unknown = sorted(set(hints) - set(chosen.hints))
    if unknown:
        raise ArgumentError(
            f"family {chosen.name!r} takes no {', '.join(unknown)}; it takes "
            f"{', '.join(chosen.hints) or 'no further arguments'}"
        )
    built = chosen.build(source, **hints)
    parity = check_parity(built.model, built.source, built.trials, built.source_name)
    built.model.parity = parity
    built.model.info = {"family": chosen.name, "source": built.source_name}
    if not parity.passed:
        advice = ""
        if parity.max_rel == float("inf"):
            advice = (
                "; the source's own output is not finite, or has another shape: look for NaN in "
                "its weights"
            )
        advice = advice or _first_difference(chosen, built)
        raise ParityError(f"the converted model does not match its source: {parity}{advice}")
    return built.model


def _first_difference(family: Family, built: Built) -> str:
    """Where the two models part, in words; empty where the family cannot tell."""
    cfg = built.model.cfg
    for trial in built.trials:
        series = trial.tensors[0]
        if len(trial.tensors) != 1 or series.ndim != 3 or series.shape[1] != cfg.n_channels:
            continue
        try:
            found = compare(built.source, built.model, series.to(cfg.device, cfg.dtype))
        except TstlensError:
            return ""
        if not found.passed:
            return f"; on {trial.name} {found}"
    return ""
