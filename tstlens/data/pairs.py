"""Clean and corrupted series side by side: what activation patching compares.

A pair asks "what in the clean run makes the model see the target class?". Pairs that share a
series are not independent of each other: `class_pairs` uses each series as rarely as it can, and
`misclassified_pairs` shares one clean series per class. Intervals over pairs are as narrow as
they look only where series differ.

Corruptions of a series that leave the rest of it alone, each giving clean/corrupted pairs.

The clean series is the one that is passed, the corrupted one is a copy in which a channel, a
stretch of time, or both are replaced. A mean removes the shape and keeps the level; another
sample keeps everything typical of the data but the class; noise removes the shape and keeps
level and spread; a shift keeps the shape and moves it. All but another sample take the series
off the data: a large effect may only say that the model has never seen such input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor

from tstlens.arguments import Count, Seed, check_fields, checked
from tstlens.data.labels import class_index, places_in
from tstlens.data.series import TimeSeriesData
from tstlens.data.validate import blanked, check_series, row_indices, usable_device
from tstlens.errors import ArgumentError, LabelError, SeriesShapeError
from tstlens.run import Runs
from tstlens.shapes import Labels, Mask, Series


@dataclass(frozen=True, eq=False, repr=False)
class Pairs:
    """Clean series, corrupted series and the class whose evidence is followed.

    Args:
        clean: ``[pair, channel, time]``.
        corrupted: ``[pair, channel, time]``.
        target: ``[pair]`` the class whose evidence is restored: the true class of the clean series.
        clean_mask: ``[pair, time]`` bool, True where observed; None where all is. What stands in
            padding becomes 0.
        corrupted_mask: the same for the corrupted series.
        clean_index: ``[pair]`` rows in the data that the pairs were made from, or None.
        corrupted_index: the same for the corrupted series.
        predicted: ``[pair]`` the class that the model gave to the corrupted series when the pairs
            were made, or None where no model was asked.
        made: how the pairs were made, plain values for JSON.
        class_names: of the targets, which a model that knows names is compared with; () for none.

    Raises:
        SeriesShapeError: clean and corrupted of different shape, or entries of another length.
        SeriesValueError: NaN, infinity or integers.
        LabelError: targets that are not class indices.

    Example:
        >>> pairs = Pairs(torch.zeros(2, 1, 8), torch.ones(2, 1, 8), torch.tensor([0, 1]))
        >>> pairs
        Pairs(n=2, channel=1, time=8)
    """

    clean: Series
    corrupted: Series
    target: Labels
    clean_mask: Mask | None = None
    corrupted_mask: Mask | None = None
    clean_index: Labels | None = None
    corrupted_index: Labels | None = None
    predicted: Labels | None = None
    made: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        check_series(self.clean, mask=self.clean_mask)
        check_series(self.corrupted, mask=self.corrupted_mask)
        if self.clean.shape != self.corrupted.shape:
            raise SeriesShapeError(
                "expected clean and corrupted of the same shape [pair, channel, time], got "
                f"{list(self.clean.shape)} and {list(self.corrupted.shape)}"
            )
        object.__setattr__(self, "clean", blanked(self.clean, self.clean_mask))
        object.__setattr__(self, "corrupted", blanked(self.corrupted, self.corrupted_mask))
        for name in ("target", "clean_index", "corrupted_index", "predicted"):
            value = getattr(self, name)
            if value is None and name != "target":
                continue
            if not isinstance(value, Tensor) or value.dtype != torch.int64:
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise LabelError(f"expected {name} as an int64 tensor [pair], got {got}")
            if value.shape != (len(self),):
                raise SeriesShapeError(
                    f"expected {name} as [pair={len(self)}], got {list(value.shape)}"
                )
        if bool((self.target < 0).any()):
            raise LabelError(f"expected targets from 0 on, got {int(self.target.min())}")
        check_fields(self)

    def __len__(self) -> int:
        return self.clean.shape[0]

    def __getitem__(self, index: Any) -> Pairs:
        rows = row_indices(index, len(self)).to(self.clean.device)
        return self._each(lambda tensor: tensor[rows])

    def __repr__(self) -> str:
        how = f", {self.made['how']}" if "how" in self.made else ""
        _, n_channels, n_time = self.clean.shape
        return f"Pairs(n={len(self)}, channel={n_channels}, time={n_time}{how})"

    def swap(self) -> Pairs:
        """Clean and corrupted exchanged, for noising instead of denoising.

        The target stays: patching now takes away the evidence that it restored before.
        ``predicted`` stays with the series it belongs to, which is now called clean.
        """
        return replace(
            self,
            clean=self.corrupted,
            corrupted=self.clean,
            clean_mask=self.corrupted_mask,
            corrupted_mask=self.clean_mask,
            clean_index=self.corrupted_index,
            corrupted_index=self.clean_index,
            made={**self.made, "swapped": not self.made.get("swapped", False)},
        )

    def check_model(self, model: Any) -> None:
        """Raise :class:`LabelError` where a class of the targets has another place in the model.

        Every analysis of a model and pairs begins with this. It cannot be done for a metric, which
        holds bare indices: make the pairs of ``data.for_model(model)``.
        """
        places = places_in(model, self.class_names) if self.class_names else None
        if places is not None and places != list(range(len(places))):
            raise LabelError(
                f"expected pairs with the model's classes in their order "
                f"{list(model.cfg.class_names)[:20]}, got {list(self.class_names)[:20]}; make the "
                "pairs of data.for_model(model)"
            )

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device."""
        found = usable_device(device)
        return self._each(lambda tensor: tensor.to(found))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        values = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(value) for name, value in values.items()})


@checked
def misclassified_pairs(
    model: Callable[..., Tensor],
    data: TimeSeriesData,
    per_class: Count | None = None,
    batch_size: Count = 256,
    *,
    equal_lengths: bool = False,
) -> Pairs:
    """Each misclassified series beside the most confidently right one of its own true class.

    Answers "what would have made the model see the true class?". A class with misclassified
    series but no right one has nothing to patch from: it is left out and listed in ``made``.

    Args:
        model: series ``[batch, channel, time]`` to logits ``[batch, class]``; called with
            ``mask=`` only where the data have one. A module is put into eval mode meanwhile.
        data: labelled series.
        per_class: at most this many misclassified series per true class, the first in the data;
            None for all.
        batch_size: series per call of the model.
        equal_lengths: only right series observed at the same samples; a misclassified one that
            has none is left out and counted in ``made``.

    Returns:
        Pairs in the order of the misclassified series in the data, with ``predicted``.

    Raises:
        ArgumentError: nothing to pair: all series are classified right, or no class has both.
        LabelError: no labels, as many logits as there are not classes, or a class whose name the
            model does not have.

    Example:
        >>> series = torch.tensor([[[2.0]], [[3.0]], [[-1.0]]])
        >>> data = TimeSeriesData(series, torch.tensor([1, 1, 1]), class_names=("a", "b"))
        >>> model = lambda series: torch.cat([-series[:, 0], series[:, 0]], dim=1)
        >>> pairs = misclassified_pairs(model, data)
        >>> pairs.clean_index, pairs.corrupted_index, pairs.predicted
        (tensor([1]), tensor([2]), tensor([0]))
    """
    data = data.for_model(model)
    labels = _labels(data)
    log_probs = _log_probs(model, data, batch_size)
    predicted = log_probs.argmax(dim=1)
    confidence = log_probs.gather(1, labels[:, None])[:, 0]
    right = predicted == labels
    if bool(right.all()):
        raise ArgumentError(
            f"expected misclassified series, got none: the model classifies all {len(data)} right; "
            "use class_pairs(data, a, b, n) to compare classes instead"
        )
    alike = observed_alike(data) if equal_lengths else torch.zeros_like(labels)
    clean, corrupted, skipped, n_alone = [], [], {}, 0
    for label in range(data.n_classes):
        wrong = ((labels == label) & ~right).nonzero()[:, 0]
        if len(wrong) and not bool(right[labels == label].any()):
            skipped[data.class_names[label]] = len(wrong)
        elif len(wrong):
            eligible = confidence.masked_fill(~right | (labels != label), -torch.inf)
            beside = eligible.masked_fill(alike[wrong, None] != alike, -torch.inf)
            having = beside.isfinite().any(1)
            n_alone += int((~having).sum())
            clean += beside.argmax(1)[having][:per_class].tolist()
            corrupted += wrong[having][:per_class].tolist()
    if not corrupted:
        raise ArgumentError(
            "expected a class with both right and misclassified series, got none: wrong throughout "
            f"are {skipped}; are the labels in the order of the model's logits?"
            + (f" {n_alone} have no right series of their length" if n_alone else "")
        )
    pairs = sorted(zip(corrupted, clean, strict=True))
    made = {
        "how": "misclassified_pairs",
        "per_class": per_class,
        "n_misclassified": int((~right).sum()),
        "skipped_classes": skipped,
        **({"equal_lengths": True, "n_without_equal": n_alone} if equal_lengths else {}),
    }
    clean_index = torch.tensor([clean for _, clean in pairs])
    corrupted_index = torch.tensor([corrupted for corrupted, _ in pairs])
    made_pairs = _pick(data, clean_index, corrupted_index, made)
    return replace(made_pairs, predicted=predicted[made_pairs.corrupted_index])


@checked
def class_pairs(
    data: TimeSeriesData,
    a: int | str,
    b: int | str,
    n: Count,
    seed: Seed = 0,
    *,
    equal_lengths: bool = False,
) -> Pairs:
    """Distinct pairs of a series of class a (clean) and one of class b (corrupted).

    Each series is used as rarely as n allows: up to the size of the smaller class no series
    comes twice.

    Args:
        data: labelled series.
        a: class of the clean series and the target: a class name as string, or an index (with a
            warning where it is also the name of another class).
        b: class of the corrupted series.
        n: how many pairs.
        seed: of the choice.
        equal_lengths: only pairs of series observed at the same samples. Where the two differ,
            patching leaves what one of them lacks alone, and the circuits refuse the pair.

    Raises:
        LabelError: no labels, no such class, or a and b the same.
        ArgumentError: fewer than n distinct pairs exist.

    Example:
        >>> data = TimeSeriesData(torch.zeros(4, 1, 8), torch.tensor([0, 0, 1, 1]))
        >>> class_pairs(data, 0, 1, n=3)
        Pairs(n=3, channel=1, time=8, class_pairs)
    """
    labels = _labels(data)
    first, second = class_index(a, data.class_names), class_index(b, data.class_names)
    if first == second:
        raise LabelError(f"expected two different classes, got {a!r} and {b!r}")
    rows_a = (labels == first).nonzero()[:, 0].cpu()
    rows_b = (labels == second).nonzero()[:, 0].cpu()
    generator = torch.Generator().manual_seed(seed)
    rows_a = rows_a[torch.randperm(len(rows_a), generator=generator)]
    rows_b = rows_b[torch.randperm(len(rows_b), generator=generator)]
    alike = observed_alike(data).cpu() if equal_lengths else torch.zeros_like(labels.cpu())
    groups = [
        (rows_a[alike[rows_a] == kind], rows_b[alike[rows_b] == kind]) for kind in alike.unique()
    ]
    possible = sum(len(some) * len(others) for some, others in groups)
    if not 1 <= n <= possible:
        beside = " with pairs of equal length" if equal_lengths else ""
        raise ArgumentError(
            f"expected n in 1..{possible} ({len(rows_a)} series of class "
            f"{data.class_names[first]!r}, {len(rows_b)} of {data.class_names[second]!r}{beside}), "
            f"got {n}"
        )
    found = torch.cat([_walk(*group, n) for group in groups])
    found = found[found[:, 2].argsort(stable=True)][:n]
    clean_index, corrupted_index = found[:, 0], found[:, 1]
    made = {
        "how": "class_pairs",
        "a": data.class_names[first],
        "b": data.class_names[second],
        "seed": seed,
        **({"equal_lengths": True} if equal_lengths else {}),
    }
    return _pick(data, clean_index, corrupted_index, made)


def observed_alike(data: TimeSeriesData) -> Tensor:
    """int [n], the same number for series that were observed at the same samples."""
    if data.mask is None:
        return torch.zeros(len(data), dtype=torch.int64, device=data.series.device)
    return torch.unique(data.mask, dim=0, return_inverse=True)[1]


def _walk(rows_a: Tensor, rows_b: Tensor, n: int) -> Tensor:
    """[pair, 3]: up to n distinct pairs, and how often the rarer side was used before each."""
    step = torch.arange(min(n, len(rows_a) * len(rows_b)))
    if not len(step):
        return step.new_zeros(0, 3)
    # Walking both lists in step repeats after their least common multiple; one more step of the
    # second list then starts a round of pairs that have not been seen.
    round_ = step // lcm(len(rows_a), len(rows_b))
    clean, corrupted = rows_a[step % len(rows_a)], rows_b[(step + round_) % len(rows_b)]
    return torch.stack([clean, corrupted, step // min(len(rows_a), len(rows_b))], 1)


def _pick(data: TimeSeriesData, clean: Tensor, corrupted: Tensor, made: dict[str, Any]) -> Pairs:
    clean, corrupted = clean.to(data.series.device), corrupted.to(data.series.device)
    return Pairs(
        clean=data.series[clean],
        corrupted=data.series[corrupted],
        target=_labels(data)[clean],
        clean_mask=None if data.mask is None else data.mask[clean],
        corrupted_mask=None if data.mask is None else data.mask[corrupted],
        clean_index=clean,
        corrupted_index=corrupted,
        class_names=data.class_names,
        made={"data": data.name, "split": data.split, **made},
    )


def _labels(data: TimeSeriesData) -> Tensor:
    if data.labels is None:
        raise LabelError("expected labelled data, got data without labels")
    return data.labels


def _log_probs(model: Callable[..., Tensor], data: TimeSeriesData, batch_size: int) -> Tensor:
    outputs: list[Any] = [one.output for one in Runs(model, data, batch_size=batch_size).passes()]
    if not isinstance(outputs[0], Tensor):
        got = type(outputs[0]).__name__
        raise ArgumentError(f"model: expected a tensor of logits, got {got}")
    logits = torch.cat(outputs)
    if logits.shape != (len(data), data.n_classes):
        raise LabelError(
            f"expected logits [batch={len(data)}, class={data.n_classes}], one per class of the "
            f"data, got {list(logits.shape)}; wrap the model so that logit i is class i"
        )
    if bool(logits.isnan().any()):
        raise ArgumentError("expected logits, got NaN from the model")
    # In float32 every confident series would tie at probability 1.
    return logits.double().log_softmax(dim=1).to(data.series.device)


Where = int | slice | Sequence[int] | None


@checked
def corrupt_with_mean(
    series: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by their own mean.

    The mean is taken per series and channel over the samples that are replaced, padding left out.

    Args:
        series: one ``[channel, time]``, a batch ``[batch, channel, time]``, or a data set.
        target: true class, one for all or ``[batch]``; a data set brings its labels.
        channel: index, slice or indices; None for all.
        time: sample, slice or samples; None for all.
        mask: ``[batch, time]`` bool, True where observed; a data set brings its own.

    Raises:
        ArgumentError: fewer than two observed samples to average over, or an index outside.
        LabelError: no target.
        SeriesShapeError, SeriesValueError: series that do not pass `check_series`.

    Example:
        >>> pairs = corrupt_with_mean(torch.tensor([[1.0, 3.0, 8.0]]), target=0, time=slice(0, 2))
        >>> pairs.corrupted
        tensor([[[2., 2., 8.]]])
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_mean")
    mean, _ = batch.mean_and_std()
    return batch.pairs(mean.expand_as(batch.series), {})


@checked
def corrupt_with_noise(
    series: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
    seed: Seed = 0,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by white Gaussian noise.

    The noise has exactly the mean and the standard deviation of what it replaces, per series
    and channel.

    Args:
        series, target, channel, time, mask: as for `corrupt_with_mean`.
        seed: of the noise.

    Raises:
        ArgumentError, LabelError, SeriesShapeError, SeriesValueError: as for `corrupt_with_mean`.

    Example:
        >>> corrupt_with_noise(torch.randn(3, 2, 50), target=0, channel=1)
        Pairs(n=3, channel=2, time=50, corrupt_with_noise)
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_noise")
    mean, std = batch.mean_and_std()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.series.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(batch.series.device)
    noise_mean, noise_std = batch.mean_and_std(noise)
    matched = (noise - noise_mean) / noise_std * std + mean
    return batch.pairs(matched, {"seed": seed})


@checked
def corrupt_with_sample(
    series: Tensor | TimeSeriesData,
    donor: Tensor | TimeSeriesData,
    target: int | Tensor | None = None,
    channel: Where = None,
    time: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series have the chosen samples replaced by those of another series.

    Args:
        series, target, channel, time, mask: as for `corrupt_with_mean`.
        donor: the other series: one ``[channel, time]`` for all, or one per series. A data set
            with padding must cover what it replaces.

    Raises:
        ArgumentError, LabelError, SeriesValueError: as for `corrupt_with_mean`; also a donor whose
            padding would be copied in.
        SeriesShapeError: a donor of another shape.

    Example:
        >>> corrupt_with_sample(torch.zeros(1, 3), torch.ones(1, 3), target=0, time=1).corrupted
        tensor([[[0., 1., 0.]]])
    """
    batch = _Batch(series, target, channel, time, mask, "corrupt_with_sample")
    other = donor.series if isinstance(donor, TimeSeriesData) else donor
    other = other[None] if isinstance(other, Tensor) and other.ndim == 2 else other
    check_series(other)
    if other.shape[1:] != batch.series.shape[1:] or other.shape[0] not in (1, len(batch.series)):
        raise SeriesShapeError(
            f"expected a donor {list(batch.series.shape[1:])} or {list(batch.series.shape)}, "
            f"got {list(other.shape)}"
        )
    if isinstance(donor, TimeSeriesData) and donor.mask is not None:
        uncovered = batch.chosen.any(dim=1) & ~donor.mask.to(batch.series.device)
        if bool(uncovered.any()):
            row, sample = uncovered.nonzero()[0].tolist()
            raise ArgumentError(
                f"expected donors that cover what they replace, got padding at sample {sample} for "
                f"series {row}; choose a longer donor or an earlier stretch"
            )
    return batch.pairs(other.to(batch.series.device).expand_as(batch.series), {})


@checked
def corrupt_with_shift(
    series: Tensor | TimeSeriesData,
    samples: int,
    target: int | Tensor | None = None,
    channel: Where = None,
    mask: Tensor | None = None,
) -> Pairs:
    """Pairs whose corrupted series are shifted in time, what leaves one end entering at the other.

    The shift is circular within the observed samples of each series, so padding stays at the end.

    Args:
        series, target, channel, mask: as for `corrupt_with_mean`.
        samples: how far; positive is later, negative earlier.

    Raises:
        ArgumentError, LabelError, SeriesShapeError, SeriesValueError: as for `corrupt_with_mean`.

    Example:
        >>> corrupt_with_shift(torch.tensor([[1.0, 2.0, 3.0]]), samples=1, target=0).corrupted
        tensor([[[3., 1., 2.]]])
    """
    batch = _Batch(series, target, channel, None, mask, "corrupt_with_shift")
    if batch.mask is None:
        shifted = batch.series.roll(samples, dims=2)
    else:
        shifted = batch.series.clone()
        for row, seen in enumerate(batch.mask):
            shifted[row, :, seen] = batch.series[row][:, seen].roll(samples, dims=1)
    return batch.pairs(shifted, {"samples": samples})


class _Batch:
    """The series, targets and chosen samples that every corruption starts from."""

    def __init__(
        self,
        series: Tensor | TimeSeriesData,
        target: int | Tensor | None,
        channel: Where,
        time: Where,
        mask: Tensor | None,
        how: str,
    ) -> None:
        self.index = None
        self.made: dict[str, Any] = {"how": how}
        if isinstance(series, TimeSeriesData):
            self.index = torch.arange(len(series), device=series.series.device)
            self.made |= {"data": series.name, "split": series.split}
            target = series.labels if target is None else target
            mask = series.mask if mask is None else mask
            series = series.series
        elif isinstance(series, Tensor) and series.ndim == 2:
            series = series[None]
            mask = mask[None] if mask is not None and mask.ndim == 1 else mask
        check_series(series, mask=mask)
        self.series, self.mask = blanked(series, mask), mask
        self.target = _targets(target, series)
        channels = _positions(channel, series.shape[1], "channel")
        times = _positions(time, series.shape[2], "time")
        self.made["channel"] = None if channel is None else channels
        self.made["time"] = None if time is None else times
        chosen = torch.zeros(series.shape, dtype=torch.bool)
        chosen[:, torch.tensor(channels)[:, None], torch.tensor(times)] = True
        self.chosen = chosen.to(series.device)
        if mask is not None:
            self.chosen &= mask[:, None]
        nothing = ~self.chosen.flatten(1).any(dim=1)
        if bool(nothing.any()):
            raise ArgumentError(
                "expected a stretch with observed samples, got only padding in series "
                f"{int(nothing.nonzero()[0, 0])}; choose an earlier stretch"
            )

    def mean_and_std(self, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[batch, channel, 1]`` of the chosen samples, float64."""
        count = self.chosen.sum(dim=2, keepdim=True)
        short = (count == 1).any(dim=1)[:, 0]
        if bool(short.any()):
            raise ArgumentError(
                "expected a stretch of at least 2 observed samples, got 1 in series "
                f"{int(short.nonzero()[0, 0])}; widen time=, or use corrupt_with_sample"
            )
        values = (self.series if values is None else values).double()
        count = count.clamp(min=1)
        mean = (values * self.chosen).sum(dim=2, keepdim=True) / count
        centred = (values - mean) * self.chosen
        return mean, (centred.square().sum(dim=2, keepdim=True) / count).sqrt()

    def pairs(self, replacement: Tensor, made: dict[str, Any]) -> Pairs:
        """The pairs with the chosen samples replaced."""
        replacement = replacement.to(self.series.dtype)
        return Pairs(
            clean=self.series,
            corrupted=torch.where(self.chosen, replacement, self.series),
            target=self.target,
            clean_mask=self.mask,
            corrupted_mask=self.mask,
            clean_index=self.index,
            corrupted_index=self.index,
            made={**self.made, **made},
        )


def _targets(target: int | Tensor | None, series: Tensor) -> Tensor:
    if target is None:
        raise LabelError("expected target, the true class of the series, got none")
    targets = torch.as_tensor(target, device=series.device)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise LabelError(f"expected target as class index, got {targets.dtype}")
    if targets.ndim == 0:
        targets = targets.expand(len(series))
    return targets.to(torch.int64)


def _positions(where: Where, size: int, axis: str) -> list[int]:
    if where is None:
        return list(range(size))
    try:
        positions = row_indices(where, size).tolist()
    except IndexError:
        positions = []
    if not positions:
        raise ArgumentError(f"expected {axis} within 0..{size - 1} and not empty, got {where!r}")
    return sorted(set(positions))
