"""``convert``: a source model in, a model with the same outputs and a hook on everything out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.conversion.checking import check_parity
from tstlens.conversion.comparing import compare
from tstlens.conversion.folders import read_source
from tstlens.conversion.registry import Built, Family, choose
from tstlens.errors import ArgumentError, ParityError, StateDictError, TstlensError
from tstlens.model import HookedTST, saving
from tstlens.randomness import seeded


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


saving.FOREIGN.append(convert)
