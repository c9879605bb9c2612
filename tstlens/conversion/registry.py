"""Which source families are known, and ``convert``, which finds the right one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tstlens.conversion.checking import Trial, check_parity
from tstlens.errors import (
    ArgumentError,
    ParityError,
    TstlensError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST


@dataclass(frozen=True)
class Built:
    """What a family makes of a source: the model and how to compare it.

    Args:
        model: the converted model.
        source: the source as a module, rebuilt from its config where only weights were given.
        trials: inputs on which both are compared, and how each side is called.
        source_name: what the parity report calls the source.
    """

    model: HookedTST
    source: nn.Module
    trials: tuple[Trial, ...]
    source_name: str


@dataclass(frozen=True)
class Family:
    """One kind of source model.

    Args:
        name: what ``family=`` takes.
        summary: one line on what it covers, for :func:`families`.
        recognises: whether a live module is of this family.
        build: called as ``build(source, **hints)`` with a module or a state dict.
        takes_state_dict: whether weights alone are enough.
        run: ``run(source, series, mask)`` gives the source's output in our layout, for
            :func:`compare`; where it takes ``model`` too, it is given the converted one.
        taps: ``taps(source, model)`` says which of the source's modules compute which of our
            activations, for :func:`compare`.
        reads: whether a ``config.json`` (as a dictionary) is of this family.
        load: the source, live, from a folder with such a ``config.json`` and its weights.
    """

    name: str
    summary: str
    recognises: Callable[[nn.Module], bool]
    build: Callable[..., Built]
    takes_state_dict: bool
    run: Callable[..., Tensor] | None = None
    taps: Callable[[Any, HookedTST], Iterable[Any]] | None = None
    reads: Callable[[Mapping[str, Any]], bool] | None = None
    load: Callable[[Path], nn.Module] | None = None
    hints: tuple[str, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        parameters = list(inspect.signature(self.build).parameters)[1:]
        object.__setattr__(self, "hints", tuple(parameters))


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known to :func:`convert`.

    Raises:
        ArgumentError: a family of this name is known already.
    """
    if family.name in _FAMILIES:
        raise ArgumentError(f"a family named {family.name!r} is registered already")
    _FAMILIES[family.name] = family
    return family


def families() -> dict[str, str]:
    """Known source families: name and one line on what each covers."""
    return {name: family.summary for name, family in sorted(_FAMILIES.items())}


def convert(
    source: nn.Module | Mapping[str, Tensor], family: str | None = None, **hints: Any
) -> HookedTST:
    """Turn a time-series transformer into a :class:`HookedTST` with the same outputs.

    Weights are copied, never trained or approximated. The result is compared with the source on
    random, constant and (where the source takes masks) padded series, in float32 and float64; the
    report is ``model.parity``. The source is left as it was.

    Args:
        source: a live module, or a state dict together with ``family``.
        family: which family to convert as; needed for a state dict. See :func:`families`.
        **hints: what the weights alone cannot tell (``n_heads`` for a state dict), or modules that
            belong to the model (``embed`` and ``head`` of a bare encoder).

    Returns:
        The converted model, in eval mode, with ``.parity`` set.

    Raises:
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
    chosen = _choose(source, family)
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
    from tstlens.conversion.comparing import compare

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


def family_of(source: object, model: HookedTST) -> Family:
    """The family that a converted model came from, if the source is of it.

    Raises:
        UnknownFamilyError: the model was not converted, or by a family that is not registered.
        UnsupportedSourceError: the source is of another family.
    """
    name = str(model.info.get("family"))
    if name not in _FAMILIES:
        raise UnknownFamilyError(name, families(), "The model's info does not tell its source")
    return _choose(source, name)


def _choose(source: object, name: str | None) -> Family:
    if name is not None and name not in _FAMILIES:
        raise UnknownFamilyError(name, families())
    if isinstance(source, Mapping):
        if name is None:
            raise ArgumentError(
                "a state dict does not tell its family; give family=, one of "
                f"{', '.join(families())}"
            )
        chosen = _FAMILIES[name]
        if not chosen.takes_state_dict:
            raise ArgumentError(f"family {name!r} converts live modules only, not state dicts")
        return chosen
    if not isinstance(source, nn.Module):
        raise ArgumentError(
            f"expected a torch module or a state dict, got {type(source).__name__}; load weights "
            "with torch.load(path, weights_only=True) or safetensors first"
        )
    matching = [family for family in _FAMILIES.values() if family.recognises(source)]
    if name is not None:
        if _FAMILIES[name] not in matching:
            raise UnsupportedSourceError(
                f"{_class_name(source)} is not a {name!r} model: {_FAMILIES[name].summary}"
            )
        return _FAMILIES[name]
    if not matching:
        raise UnknownFamilyError(
            _class_name(source),
            families(),
            "No family recognises this class; a subclass that overrides forward is not recognised "
            "either, because its outputs may differ",
        )
    return matching[0]


def _class_name(source: object) -> str:
    return f"{type(source).__module__}.{type(source).__qualname__}"
