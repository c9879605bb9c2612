"""Compare a converted model with its source activation by activation, in the order they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tstlens.arguments import checked
from tstlens.errors import ArgumentError, UnsupportedSourceError
from tstlens.model import HookedTST
from tstlens.results import Result
from tstlens.zoo import registry
from tstlens.zoo.parity import TOLERANCE, eval_mode, relative_difference

if TYPE_CHECKING:
    import pandas as pd


def _same(seen: Tensor) -> Tensor:
    return seen


@dataclass(frozen=True)
class Tap:
    """Where a source computes the activation that one of our hook points holds.

    Args:
        hook_name: our hook point.
        module_path: the source's submodule, as ``source.get_submodule`` takes it.
        transform: from what the submodule gives (or takes) to our layout.
        of: ``"output"`` of the submodule, or its first ``"input"``.
        call: which call of the submodule in one run, where it is called more than once.
        observed_only: whether padded positions are left out, for sources that compute something
            else there, which nothing reads.
    """

    hook_name: str
    module_path: str
    transform: Callable[[Any], Tensor] = _same
    of: Literal["output", "input"] = "output"
    call: int = 0
    observed_only: bool = False


@dataclass(frozen=True)
class Difference:
    """How far one activation is from the source's.

    Args:
        hook_name: our hook point, or ``"output"``.
        source: the source's submodule, or ``"output"``.
        shape: of the activation; both shapes in words where they differ.
        max_abs: largest absolute difference.
        max_rel: the same divided by the largest absolute value in the source.
    """

    hook_name: str
    source: str
    shape: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class Comparison(Result):
    """What :func:`compare` found: one difference per activation, in the order they run.

    Args:
        differences: of every activation that both models compute, the output last.
        tolerance: of ``max_rel``.
        source: the source's class.
    """

    differences: tuple[Difference, ...]
    tolerance: float
    source: str

    @property
    def first_difference(self) -> Difference | None:
        """The first activation beyond the tolerance, or None where all agree."""
        beyond = [found for found in self.differences if not found.max_rel <= self.tolerance]
        return beyond[0] if beyond else None

    @property
    def passed(self) -> bool:
        """Whether every activation agrees within the tolerance."""
        return self.first_difference is None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per activation: hook point, source module, shape, differences."""
        import pandas as pd

        return pd.DataFrame([vars(found) for found in self.differences])

    def __str__(self) -> str:
        first = self.first_difference
        if first is None:
            worst = max(self.differences, key=lambda found: found.max_rel)
            return (
                f"{len(self.differences)} activations of {self.source} agree within "
                f"{self.tolerance:.0e} of their scale; the farthest is {worst.hook_name} "
                f"({worst.max_rel:.1e})"
            )
        return (
            f"the first activation that differs from {self.source} is {first.hook_name} "
            f"(there {first.source}): {first.max_rel:.1e} of its scale, limit "
            f"{self.tolerance:.0e}, shape {first.shape}"
        )


@checked
@torch.no_grad()
def compare(
    source: nn.Module,
    model: HookedTST,
    series: Tensor,
    mask: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Run both models and compare every activation that both compute.

    The question is where two models part: the parity report says that they do, this says from
    which activation on. Read the first difference; later ones follow from it. An activation that
    agrees was computed alike on these series, not on all series.

    Args:
        source: the source model, live; run in eval mode, its training mode comes back.
        model: the converted model.
        series: float [batch, channel, time], as ``model`` takes them.
        mask: bool [batch, time], for sources that take masks.
        tolerance: of the largest difference, relative to the activation's largest value.

    Raises:
        UnsupportedSourceError: the source's family does not say where its activations are.
        ArgumentError: the source lacks a module that the family expects.

    Example:
        >>> import torch, tstlens
        >>> from tstlens.training import ConvTST
        >>> source = ConvTST(n_channels=2, n_time=30, n_classes=4)
        >>> print(tstlens.zoo.compare(source, tstlens.convert(source),
        ...     torch.randn(3, 2, 30)).first_difference)
        None
    """
    family = registry.family_of(source, model)
    if family.run is None or family.taps is None:
        raise UnsupportedSourceError(
            f"family {family.name!r} does not say where its source computes which activation; "
            "give run= and taps= when registering it"
        )
    model.check_series(model.with_covariates(series), mask)
    if not len(series):
        raise ArgumentError("expected at least one series to compare on, got none")
    taps = tuple(family.taps(source, model))
    seen: dict[tuple[str, str], list[Any]] = {}
    places = dict.fromkeys((tap.module_path, tap.of) for tap in taps)
    handles = [_listen(source, path, of, seen) for path, of in places]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it bypasses the modules that taps listen to
    try:
        with eval_mode(source):
            told = {"model": model} if "model" in signature(family.run).parameters else {}
            theirs = family.run(source, series, mask, **told)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    ours, cache = model.run_with_cache(
        series, names_filter=[tap.hook_name for tap in taps], mask=mask
    )
    some_only = any(tap.observed_only for tap in taps)
    pos_mask = model.embed_series(series, mask)[1].pos_mask if some_only else None
    order = {name: number for number, name in enumerate(cache.cache_dict)}
    differences = []
    for tap in sorted(taps, key=lambda tap: order[tap.hook_name]):
        calls = seen.get((tap.module_path, tap.of), [])
        if len(calls) <= tap.call:
            raise ArgumentError(
                f"{tap.module_path} ran {len(calls)} times in the source; the tap of "
                f"{tap.hook_name} asks for call {tap.call}"
            )
        pair = cache[tap.hook_name], tap.transform(calls[tap.call])
        if tap.observed_only and pos_mask is not None:
            pair = tuple(_observed(tap.hook_name, activation, pos_mask) for activation in pair)
        differences.append(_differ(tap.hook_name, tap.module_path, *pair))
    differences.append(_differ("output", "output", ours, theirs))
    return Comparison(tuple(differences), tolerance, type(source).__qualname__)


def _listen(source: nn.Module, path: str, of: str, seen: dict[tuple[str, str], list[Any]]) -> Any:
    try:
        module = source.get_submodule(path)
    except AttributeError as error:
        raise ArgumentError(
            f"{type(source).__qualname__} has no module {path!r}, which its family reads"
        ) from error

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        seen.setdefault((path, of), []).append(_copied(output if of == "output" else given))

    return module.register_forward_hook(keep, with_kwargs=True)


def _copied(value: Any) -> Any:
    """Tensors as they were when the hook saw them: a source may go on in place."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple | list) else value


def _observed(hook_name: str, activation: Tensor, pos_mask: Tensor) -> Tensor:
    """An activation of the trunk with zeros at padded positions (queries, of a pattern)."""
    by_query = hook_name.endswith(("hook_pattern", "hook_attn_scores"))
    if by_query and ".channel_attn." in hook_name:  # [batch, pos, head, query, key]
        by_series = pos_mask.unflatten(0, (-1, activation.shape[-1])).transpose(1, 2)
        return torch.where(by_series[:, :, None, :, None], activation, 0.0)
    shape = [len(pos_mask), *[1] * (activation.ndim - 1)]
    shape[2 if by_query else 1] = pos_mask.shape[1]
    return torch.where(pos_mask.view(shape), activation, 0.0)


def _differ(hook_name: str, path: str, ours: Tensor, theirs: Tensor) -> Difference:
    if ours.shape != theirs.shape:
        shape = f"{list(ours.shape)} here, {list(theirs.shape)} in the source"
        return Difference(hook_name, path, shape, float("inf"), float("inf"))
    relative, absolute = relative_difference(ours, theirs)
    return Difference(hook_name, path, str(list(ours.shape)), absolute, relative)
