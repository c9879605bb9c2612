"""What forcing or banning codes does to the output, beside random codes as frequent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from tstlens.arguments import Count, Seed, check_fields, checked, configured, one_per_row
from tstlens.data import TimeSeriesData
from tstlens.data.labels import IndexNames, class_index
from tstlens.errors import ArgumentError, HookError
from tstlens.metrics import name_of
from tstlens.model import HookedTST
from tstlens.model.codes import Book
from tstlens.model.hooking import require_one_pass
from tstlens.points import Index
from tstlens.results import TableResult
from tstlens.run import Runs
from tstlens.stats import half_width

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CodeEffects(TableResult):
    """A measure of the output under an intervention on codes, by number of positions.

    ``to_dataframe()`` has one row per codes (control -1 is those asked about), dose and series.

    Args:
        values: [dose, series], with the codes that were asked about.
        controls: [control, dose, series], with random codes about as frequent.
        baseline: [series], with the codebooks in and nothing intervened on.
        doses: positions per row that were intervened on (fewer where a row has fewer).
        measure: what was measured, such as "probability of class 3".
        action: "force" or "ban".
        codes: hook point -> group -> codes.
        control_codes: the same of every control.
        frequency: share of the places at which a code is active, mean over the codes.
        control_frequency: [control], the same of every control.
        made: model, data, seed, and how codes filled up.
    """

    values: Float[np.ndarray, "dose series"]
    controls: Float[np.ndarray, "control dose series"]
    baseline: Float[np.ndarray, " series"]
    doses: tuple[int, ...]
    measure: str
    action: str
    codes: dict[str, dict[int, list[int]]]
    control_codes: tuple[dict[str, dict[int, list[int]]], ...]
    frequency: float
    control_frequency: Float[np.ndarray, " control"]
    made: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        means = zip(self.doses, self.effect().mean(1), strict=True)
        by_dose = ", ".join(f"{dose}: {change:+.3g}" for dose, change in means)
        return (
            f"CodeEffects({self.action} {self.codes}, {len(self.baseline)} series, change of the "
            f"{self.measure} by positions {{{by_dose}}}, {len(self.controls)} controls)"
        )

    def effect(self) -> Float[np.ndarray, "dose series"]:
        """Change of the measure by the intervention."""
        return self.values - self.baseline

    def control_effects(self) -> Float[np.ndarray, "control dose series"]:
        """Change of the measure by the same on every control."""
        return self.controls - self.baseline

    def half_width(self) -> Float[np.ndarray, " dose"]:
        """Half of the normal 95 % interval of the mean effect over series; NaN for a single one."""
        effect = self.effect()
        return half_width(effect.T) if effect.shape[1] > 1 else np.full(len(effect), np.nan)

    def summary(self) -> pd.DataFrame:
        """One row per dose: effect, controls' effect, and tests of the difference.

        Columns: ``effect`` and ``control`` are means over series (and controls); ``d`` is Cohen's
        d of the paired differences (their mean over their standard deviation; infinite where all
        are equal, as they are when every position is forced to the same); ``p_series`` is
        Wilcoxon's signed-rank test of them, two-sided: do series agree that these codes move the
        measure other than random ones? ``p_codes`` is the share of controls that move it at least
        as far in the same direction, the codes themselves counted in: are these codes special
        among codes? It cannot be below 1 / (controls + 1).
        """
        import pandas as pd

        rows = []
        for at, dose in enumerate(self.doses):
            effect, control = self.effect()[at], self.control_effects()[:, at]
            difference = effect - control.mean(0)
            differ = len(difference) > 1 and bool(np.any(difference != 0))
            sign = 1.0 if effect.mean() >= control.mean() else -1.0
            as_far = int((sign * control.mean(1) >= sign * effect.mean()).sum())
            rows.append(
                {
                    "dose": dose,
                    "effect": float(effect.mean()),
                    "control": float(control.mean()),
                    "d": _cohens_d(difference),
                    "p_series": float(stats.wilcoxon(difference)[1]) if differ else float("nan"),  # type: ignore[index]
                    "p_codes": (1 + as_far) / (1 + len(control)),
                }
            )
        return pd.DataFrame(rows)

    def _rows(self) -> dict[str, Any]:
        stacked = np.concatenate([self.values[None], self.controls])  # [control, dose, series]
        control, dose, series = np.indices(stacked.shape)
        return {
            "control": control.ravel() - 1,
            "dose": np.asarray(self.doses)[dose.ravel()],
            "series": series.ravel(),
            "value": stacked.ravel(),
            "effect": (stacked - self.baseline).ravel(),
        }


def _cohens_d(difference: np.ndarray) -> float:
    mean = float(difference.mean())
    if len(difference) < 2 or not np.any(difference != 0):
        return float("nan")
    spread = float(difference.std(ddof=1))
    rounding = 1e-6 * float(np.abs(difference).max())
    return mean / spread if spread > rounding else float(np.copysign(np.inf, mean))


ByGroup = dict[str, dict[int, list[int]]]
Measure = Literal["probability", "log_probability", "forecast"] | Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class EffectsConfig:
    """What is done to codes, where, and how often; see :func:`effects`.

    Args:
        action: ``"force"`` makes the codes active, ``"ban"`` keeps them from it.
        doses: numbers of positions; None for 1, 2, 4 … and all of them.
        group, head: which tables, as for ``model.force_codes``.
        n_controls: random sets of codes. Each code is replaced by one of the ``n_controls`` of
            its own table that are nearest to it in frequency.
        others: as for ``model.force_codes``.
        fill: as for ``model.ban_codes``.
        seed: of positions and controls.
        batch_size: series per forward pass.
    """

    action: Literal["force", "ban"] = "force"
    doses: Sequence[int] | None = None
    group: Any = None
    head: Any = None
    n_controls: Count = 20
    others: Literal["keep", "drop"] = "keep"
    fill: Literal["next", "zero"] = "next"
    seed: Seed = 0
    batch_size: Count = 256

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@configured(EffectsConfig)
@torch.no_grad()
def effects(
    model: HookedTST,
    data: TimeSeriesData,
    codes: Mapping[str, Any],
    config: EffectsConfig | None = None,
    *,
    label: int | str | None = None,
    measure: Measure | None = None,
    reference: TimeSeriesData | None = None,
    progress: bool = True,
    **settings: Any,
) -> CodeEffects:
    """Force (or ban) codes at more and more positions, and do the same with random codes.

    Answers "does this code do what it was found for?": codes that a search found for a class on the
    training split should move test series towards it, further than codes as frequent that were
    drawn at random. Positions are drawn at random in every row, never padding, and those of a
    smaller dose are among those of a larger one.

    What can mislead: many positions of one code are an activation that no series has, so a large
    dose may move the output for that reason alone, which the controls show; series that are of the
    class already leave no room, so give the others (``data[data.labels != 3]``); and the paired
    test over series holds for these codes alone, see :meth:`CodeEffects.summary`.

    Args:
        model: with codebooks in, switched on.
        data: series to intervene on; the test split, if the codes were found on the other.
        codes: hook point -> code, codes, or group -> codes, as for ``model.force_codes``.
        config: what is done to them; the defaults of :class:`EffectsConfig` where None.
        label: the class whose probability is measured.
        measure: ``"probability"`` (the default with ``label``), ``"log_probability"`` (nats),
            ``"forecast"`` (its mean over channels and steps, the default for a forecaster), or a
            function from outputs [batch, ...] to [batch].
        reference: data that frequencies are counted on, such as the training split; ``data``
            itself where None, which says little where ``data`` leaves out the class of the codes.
        progress: show a progress bar.
        **settings: fields of :class:`EffectsConfig`, in place of those of ``config``:
            ``action="ban"``.

    Returns:
        Values, controls and baseline; ``summary()`` has effect sizes and tests.

    Raises:
        ArgumentError: nothing to measure, an impossible dose, too few codes for controls, or a
            trunk that holds mirrored series too.
        UnknownHookError, HookError: no codebook there, or one that is switched off.

    Example:
        >>> from tstlens import HookedTST, codebooks, load_dataset
        >>> model, hook = HookedTST.from_pretrained("japanese-vowels"), "blocks.1.hook_mlp_out"
        >>> data = load_dataset("JapaneseVowels", split="test")[:20]
        >>> _ = model.add_codebooks(codebooks.CodebookConfig(n_codes=32), hooks=[hook])
        >>> found = codebooks.effects(model, data, {hook: 17}, label=3, doses=[1, 25],
        ...                           n_controls=4, progress=False)
        >>> found.values.shape, found.controls.shape
        ((2, 20), (4, 2, 20))
    """
    require_one_pass(model, "to measure what codes do")
    config = config or EffectsConfig()
    read, name = _measure(model, measure, label, model.cfg.class_names or data.class_names)
    asked = model.codes_by_group(codes, config.group, config.head)
    usage = _frequencies(model, reference or data, list(asked), config.batch_size)
    generator = np.random.default_rng(config.seed)
    order, n_observed = _order(model, data, generator, config.batch_size)
    doses = _doses(config.doses, order.shape[1])
    tested = [asked, *_controls(asked, usage, config.n_controls, generator)]
    head = config.head if _shared(model, asked) else None
    runs, n_rows = Runs(model, data, batch_size=config.batch_size), len(order) // len(data)

    def intervened(wanted: ByGroup, where: Tensor) -> Any:
        if config.action == "force":
            return model.force_codes(wanted, where, head=head, others=config.others)
        return model.ban_codes(wanted, config.fill, where, head=head)

    def run(wanted: ByGroup | None, dose: int) -> Float[np.ndarray, " series"]:
        parts = []
        for at in runs.parts():
            rows = slice(at.start * n_rows, at.stop * n_rows)
            where = (order[rows] < dose) & (order[rows] < n_observed[rows, None])
            with nullcontext() if wanted is None else intervened(wanted, where):
                output: Any = runs.at(at).output
            parts.append(one_per_row(read(output), output, "measure"))
        return torch.cat(parts).double().cpu().numpy()

    baseline = run(None, 0)
    asked_for = tqdm(
        [(wanted, dose) for wanted in tested for dose in doses],
        desc=f"{config.action} codes",
        unit="run",
        disable=not progress,
    )
    found = np.stack([run(wanted, dose) for wanted, dose in asked_for])
    found = found.reshape(len(tested), len(doses), -1)
    frequency = np.array([_mean_frequency(one, usage) for one in tested])
    filled = "others" if config.action == "force" else "fill"
    return CodeEffects(
        values=found[0],
        controls=found[1:],
        baseline=baseline,
        doses=doses,
        measure=name,
        action=config.action,
        codes=asked,
        control_codes=tuple(tested[1:]),
        frequency=float(frequency[0]),
        control_frequency=frequency[1:],
        made={
            "model": model.cfg.model_name,
            "data": " ".join(part for part in (data.name, data.split) if part),
            "n_series": len(data),
            "seed": config.seed,
            filled: getattr(config, filled),
        },
    )


@checked
@contextmanager
def ban_nearest(
    model: HookedTST,
    n: Count = 1,
    hooks: str | Sequence[str] | None = None,
    *,
    fill: Literal["next", "zero"] = "next",
    pos: Index | Tensor = None,
    group: Index = None,
    head: Index = None,
) -> Iterator[HookedTST]:
    """Keep the ``n`` codes most like each activation from being active, whichever they are.

    Answers "does the model need the nearest codes, or do those that come after them say the
    same?". ``model.ban_codes`` bans codes by their number instead, at every activation alike.
    Inside a ``force_codes`` the forced codes are the nearest.

    Args:
        model: with codebooks in, switched on.
        n: so many, in each group (and at each head).
        hooks: of which codebooks; None for all.
        fill: ``"next"`` lets the codes that follow take their places; ``"zero"`` leaves those
            places empty.
        pos, group, head: where, as for ``model.force_codes``; None for everywhere.

    Raises:
        UnknownHookError: no codebook is spliced in there.
        HookError: a codebook that is switched off.
        ArgumentError: fewer than k codes left, or no such position, group or head.

    Source: Tamkin, Taufeeque, Goodman 2023 (their code's ``disable_topk``).

    Example:
        >>> import torch
        >>> from tstlens import HookedTST, codebooks
        >>> model, hook = HookedTST.from_pretrained("japanese-vowels"), "blocks.1.hook_mlp_out"
        >>> _ = model.add_codebooks(codebooks.CodebookConfig(n_codes=32, k=2), hooks=[hook])
        >>> series = torch.randn(1, 12, 25)
        >>> before = model.code_ids(series)[hook][..., 1]
        >>> with codebooks.ban_nearest(model):
        ...     torch.equal(model.code_ids(series)[hook][..., 0], before)
        True
    """
    splices = model.code_splices(hooks)
    model.require_on(splices)
    books = [Book.at(model, name) for name in splices]
    edits = [edit for book in books for edit in _without_nearest(book, n, fill, pos, (group, head))]
    with model.hooks(fwd_hooks=edits):
        yield model


def _without_nearest(
    book: Book, n: int, fill: str, pos: Any, tables: tuple[Any, Any]
) -> list[tuple[str, Any]]:
    if book.n_codes - n < (book.k if fill == "next" else 0):
        raise ArgumentError(
            f"banning {n} of {book.n_codes} codes at {book.hook} leaves fewer than k={book.k}; "
            "ban fewer"
        )
    nearest: list[Tensor] = []  # bool, of the run that is under way

    def find(similarities: Tensor, hook: Any) -> Tensor:
        by_group = book.by_group(similarities)
        banned = torch.zeros_like(by_group, dtype=torch.bool)
        banned.scatter_(-1, by_group.topk(n, dim=-1).indices, True)
        banned &= book.selected(similarities, pos, *tables)
        nearest[:] = [banned.flatten(-2)]
        return similarities.masked_fill(nearest[0], -torch.inf) if fill == "next" else similarities

    def empty(acts: Tensor, hook: Any) -> Tensor:
        return acts.masked_fill(nearest[0], 0.0)

    edits = [(f"{book.hook}.hook_sae_acts_pre", find)]
    return edits if fill == "next" else [*edits, (f"{book.hook}.hook_sae_acts_post", empty)]


def _measure(
    model: HookedTST,
    measure: Measure | None,
    label: int | str | None,
    names: Sequence[str] | None = None,
) -> tuple[Callable[[Tensor], Tensor], str]:
    if callable(measure):
        return measure, name_of(measure)
    n_classes = model.cfg.n_classes
    kind = measure or ("probability" if n_classes is not None else "forecast")
    if kind == "forecast":
        if n_classes is not None:
            raise ArgumentError("measure='forecast' is for forecasters; give label= for a class")
        return (lambda output: output.flatten(1).mean(1)), "mean forecast"
    if kind not in ("probability", "log_probability"):
        raise ArgumentError(
            "expected measure to be 'probability', 'log_probability', 'forecast' or a function, "
            f"got {measure!r}"
        )
    outside = isinstance(label, int) and not 0 <= label < (n_classes or 0)
    if n_classes is None or label is None or outside:
        raise ArgumentError(
            f"expected label=, a class in 0..{(n_classes or 1) - 1} to measure the probability of, "
            f"got {label}"
        )
    names = names if names and len(names) == n_classes else IndexNames(n_classes)
    label = class_index(label, names)
    log = kind == "log_probability"
    called = str(label)
    if names[label] != called:
        called = f"{names[label]} (label {label})"
    name = f"{'log ' if log else ''}probability of class {called}{' (nats)' if log else ''}"

    def read(output: Tensor) -> Tensor:
        chance = output.log_softmax(-1)[:, label]
        return chance if log else chance.exp()

    return read, name


def _shared(model: HookedTST, asked: ByGroup) -> bool:
    """Whether heads share one table here, so that the k-hot vector has a head axis."""
    kinds = {Book.at(model, name).shared for name in asked}
    if len(kinds) > 1:
        raise ArgumentError(
            "expected codebooks that all have a table per head, or none; ask about them one by one"
        )
    return kinds == {True}


def _frequencies(
    model: HookedTST, data: TimeSeriesData, hooks: list[str], batch_size: int
) -> dict[str, Tensor]:
    """Hook point -> [group, code], share of observed places at which a code is active."""
    found: dict[str, Tensor] = {}
    places: dict[str, int] = dict.fromkeys(hooks, 0)
    runs = Runs(model, data, batch_size=batch_size)
    for at in runs.parts():
        with model.watch_codes() as seen:
            runs.at(at)
        for name in hooks:
            if name not in seen:
                raise HookError(f"the codebook at {name} is switched off; model.set_snapping(True)")
            snap, keep = seen[name].snap, seen[name].keep
            counts = model.acts_to_codebooks[name].usage(snap.acts, keep)
            found[name] = found[name] + counts if name in found else counts
            places[name] += snap.acts[..., 0].numel() if keep is None else int(keep.sum())
    return {name: counts.double() / max(places[name], 1) for name, counts in found.items()}


def _controls(
    asked: ByGroup, usage: dict[str, Tensor], n_controls: int, generator: np.random.Generator
) -> list[ByGroup]:
    controls: list[ByGroup] = [
        {hook: {group: [] for group in groups} for hook, groups in asked.items()}
        for _ in range(n_controls)
    ]
    for hook, groups in asked.items():
        for group, codes in groups.items():
            shares = usage[hook][group].cpu().numpy()
            free = np.setdiff1d(np.arange(len(shares)), codes)
            needed = n_controls + len(codes) - 1
            if len(free) < needed:
                raise ArgumentError(
                    f"expected at least {needed} other codes at {hook} to draw {n_controls} "
                    f"controls from, got {len(free)}; ask for fewer controls"
                )
            for code in codes:
                shuffled = generator.permutation(free)
                nearest = np.argsort(np.abs(shares[shuffled] - shares[code]), kind="stable")
                pool = shuffled[nearest][:needed]
                for control, first in zip(controls, generator.permutation(n_controls), strict=True):
                    taken, turned = control[hook][group], np.roll(pool, -int(first)).tolist()
                    taken.append(next(other for other in turned if other not in taken))
    return controls


def _mean_frequency(codes: ByGroup, usage: dict[str, Tensor]) -> float:
    shares = [
        float(usage[hook][group, code])
        for hook, groups in codes.items()
        for group, wanted in groups.items()
        for code in wanted
    ]
    return float(np.mean(shares))


def _order(
    model: HookedTST, data: TimeSeriesData, generator: np.random.Generator, batch_size: int
) -> tuple[Tensor, Tensor]:
    """[row, pos], each position's turn, padding last; and [row], how many are observed."""
    masks = []
    runs = Runs(model, data, batch_size=batch_size)
    for at in runs.parts():
        residual, state = model.embed_series(*runs.placed(at))
        everywhere = torch.ones(residual.shape[:2], dtype=torch.bool, device=residual.device)
        masks.append(everywhere if state.pos_mask is None else state.pos_mask)
    observed = torch.cat(masks)
    keys = torch.from_numpy(generator.random(tuple(observed.shape))).to(observed.device)
    turns = (keys + (~observed).double()).argsort(1).argsort(1)
    return turns, observed.sum(1)


def _doses(doses: Sequence[int] | None, n_pos: int) -> tuple[int, ...]:
    if doses is None:
        powers = [2**power for power in range(n_pos.bit_length()) if 2**power < n_pos]
        return (*powers, n_pos)
    steps = tuple(sorted({int(dose) for dose in doses}))
    if not steps or steps[0] < 1 or steps[-1] > n_pos:
        raise ArgumentError(f"expected doses in 1..{n_pos} positions, got {list(doses)}")
    return steps
