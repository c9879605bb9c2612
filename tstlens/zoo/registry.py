"""Which source families are known, and which one a source is of.

Time-series models that are known and not converted, each with the reason.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tstlens import family_index
from tstlens.errors import (
    ArgumentError,
    SourcePackageError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.parity import Trial

REFUSED = {
    "informer": "Informer draws the keys that its attention looks at at random, in eval mode too, "
    "so it has no fixed attention pattern to hook",
    "autoformer": "Autoformer's autocorrelation moves whole series against each other; it has no "
    "attention over positions to hook",
    "patchtsmixer": "PatchTSMixer mixes by MLPs and has no attention by default",
    "tirex": "TiRex is an xLSTM, not a transformer",
    "temporalfusiontransformer": "the Temporal Fusion Transformer is an LSTM with gated variable "
    "selection around one attention, which the blocks here do not cover",
}


def why_refused(name: str) -> str | None:
    """Why a model of this class or family name is not converted; None where nothing is known."""
    plain = name.rsplit(".", 1)[-1].lower().replace("-", "").replace("_", "")
    found = [reason for start, reason in REFUSED.items() if plain.startswith(start)]
    return found[0] if found else None


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
        recognises: whether a live module is of this family.
        build: called as ``build(source, **hints)`` with a module or a state dict.
        takes_state_dict: whether weights alone are enough.
        run: ``run(source, series, mask)`` gives the source's output in our layout, for
            :func:`compare`; where it takes ``model`` too, it is given the converted one.
        taps: ``taps(source, model)`` says which of the source's modules compute which of our
            activations, for :func:`compare`.
        reads: whether a ``config.json`` (as a dictionary) is of this family.
        load: the source, live, from a folder with such a ``config.json`` and its weights.
        summary: one line on what it covers; of a family that ships, ``family_index.py`` says it.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    build: Callable[..., Built]
    takes_state_dict: bool
    run: Callable[..., Tensor] | None = None
    taps: Callable[[Any, HookedTST], Iterable[Any]] | None = None
    reads: Callable[[Mapping[str, Any]], bool] | None = None
    load: Callable[[Path], nn.Module] | None = None
    summary: str = ""
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


def register_classes(
    name: str,
    classes: Sequence[str],
    build: Callable[..., Built],
    run: Callable[..., Tensor],
    taps: Callable[[Any, HookedTST], Iterable[Any]],
    restated: tuple[type, ...] = (),
    reads: Callable[[Mapping[str, Any]], bool] | None = None,
    load: Callable[[Path], nn.Module] | None = None,
    folders: bool = False,
) -> Family:
    """Register a family whose sources are exactly these classes, or weights of one of them.

    Args:
        name: as the index of families has it.
        classes: with their modules; subclasses are not taken for them.
        build: see :class:`Family`, as ``run``, ``taps``, ``reads`` and ``load``.
        run: the source's output in our layout.
        taps: where the source computes our activations.
        restated: classes of our own that stand in for the source where only weights were given.
        reads: whether a ``config.json`` is of this family.
        load: the source from a folder.
        folders: whether a folder is one of ``save_pretrained``, whose ``config.json`` names the
            class; ``reads`` and ``load`` then follow from the classes.
    """

    def recognises(source: nn.Module) -> bool:
        return dotted(source) in classes or isinstance(source, restated)

    def named(config: Mapping[str, Any]) -> list[str]:
        architectures = config.get("architectures") or ()
        return [path for path in classes if path.rsplit(".", 1)[1] in architectures]

    def load_folder(folder: Path) -> nn.Module:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = class_of([*named(config), *classes][0])
        return kind.from_pretrained(str(folder)).eval()

    if folders:
        reads = reads or (lambda config: bool(named(config)))
        load = load or load_folder
    return register(Family(name, recognises, build, True, run, taps, reads, load))


def dotted(source: object) -> str:
    """Module and class of an object: exact, so that subclasses are not taken for their base."""
    return f"{type(source).__module__}.{type(source).__qualname__}"


def class_of(name: str) -> Any:
    """A class by its module and name.

    Raises:
        SourcePackageError: its package is not there, or an older version.
    """
    module, leaf = name.rsplit(".", 1)
    try:
        return getattr(import_module(module), leaf)
    except (ImportError, AttributeError) as error:
        raise SourcePackageError(
            f"weights are compared with a {leaf} rebuilt from them, which needs a version of "
            f"{module.split('.')[0]} that has {name}"
        ) from error


def known() -> dict[str, Family]:
    """Every family, by name: those that ship in the order of the index, then those of users."""
    for entry in family_index.FAMILIES.values():
        import_module(f"tstlens.zoo.{entry.module}")
    return _FAMILIES


def families() -> dict[str, str]:
    """Known source families: name and one line on what each covers."""
    ship = {name: entry.summary for name, entry in family_index.FAMILIES.items()}
    return dict(sorted({**{n: f.summary for n, f in _FAMILIES.items()}, **ship}.items()))


def family_of(source: object, model: HookedTST) -> Family:
    """The family that a converted model came from, if the source is of it.

    Raises:
        UnknownFamilyError: the model was not converted, or by a family that is not registered.
        UnsupportedSourceError: the source is of another family.
    """
    name = str(model.info.get("family"))
    if name not in known():
        raise UnknownFamilyError(name, families(), "The model's info does not tell its source")
    return choose(source, name)


def choose(source: object, name: str | None) -> Family:
    """The family of a source: the one that is named, or the first that recognises it.

    Raises:
        UnknownFamilyError: no family of this name, or none that recognises the source.
        UnsupportedSourceError: the source is not of the named family.
        ArgumentError: something that is neither a module nor a state dict, or a state dict
            without a family or of one that takes live modules only.
    """
    if name is not None and name not in known():
        _refuse(name)
        raise UnknownFamilyError(name, families())
    if isinstance(source, Mapping):
        if name is None:
            raise ArgumentError(
                "a state dict does not tell its family; give family=, one of "
                f"{', '.join(families())}"
            )
        chosen = known()[name]
        if not chosen.takes_state_dict:
            raise ArgumentError(f"family {name!r} converts live modules only, not state dicts")
        return chosen
    if not isinstance(source, nn.Module):
        raise ArgumentError(
            f"expected a torch module or a state dict, got {type(source).__name__}; load weights "
            "with torch.load(path, weights_only=True) or safetensors first"
        )
    matching = [family for family in known().values() if family.recognises(source)]
    if name is not None:
        if known()[name] not in matching:
            raise UnsupportedSourceError(
                f"{dotted(source)} is not a {name!r} model: {families()[name]}"
            )
        return known()[name]
    if not matching:
        _refuse(dotted(source))
        raise UnknownFamilyError(
            dotted(source),
            families(),
            "No family recognises this class; a subclass that overrides forward is not recognised "
            f"either, because its outputs may differ{_encoder_inside(source)}",
        )
    return matching[0]


def _encoder_inside(source: nn.Module) -> str:
    """What to do with a model of one's own around torch's encoder; empty for others."""
    for name, module in source.named_modules():
        if type(module) is nn.TransformerEncoder:
            return (
                f". It holds a torch.nn.TransformerEncoder, which converts: convert(model.{name}, "
                "embed=<module from series to positions>, head=<module from positions to "
                "outputs>, example=<some series>)"
            )
    return ""


def family_reading(config: Mapping[str, Any], name: str | None) -> Family:
    """The family that knows a ``config.json``, among those with a format on disk.

    Raises:
        UnknownFamilyError: no family of this name, or none that knows the config.
        UnsupportedSourceError: the named family has no format on disk, or another config.
    """
    readers = [family for family in known().values() if family.reads and family.load]
    if name is not None and name not in known():
        raise UnknownFamilyError(name, families())
    matching = [family for family in readers if family.reads and family.reads(config)]
    if name is not None:
        if known()[name] not in matching:
            names = ", ".join(family.name for family in readers)
            raise UnsupportedSourceError(
                f"this config.json is not of a {name!r} model; families with a folder format: "
                f"{names}. Else convert the live model, or a state dict"
            )
        return known()[name]
    if not matching:
        for described in [config.get("model_type"), *(config.get("architectures") or [])]:
            _refuse(str(described))
        described = config.get("architectures") or config.get("model_type") or "without a type"
        raise UnknownFamilyError(described, [family.name for family in readers])
    return matching[0]


def _refuse(name: str) -> None:
    reason = why_refused(name)
    if reason is not None:
        raise UnsupportedSourceError(f"{name} is not converted: {reason}")
