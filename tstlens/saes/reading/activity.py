"""The activations of every latent of a dictionary over a data set, kept sparse.

Where a dictionary sits in a model: the hook it reads, the hook it writes, its directions.

The stretches of raw series where a latent is strongest.

A dictionary of single heads, read at every head of a layer at once.

Many edits of one activation at once: each is a world along the batch axis.

The series run once; a world starts at the block that the dictionary writes to, from the clean
residual stream, adds its change to the activation there, and everything after it is computed anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_matrix, vstack
from torch import Tensor, nn
from tqdm.auto import tqdm

from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.model import HookedTST, TrunkState
from tstlens.points import layer_of
from tstlens.results import Result
from tstlens.saes.checks import check_dictionary

if TYPE_CHECKING:
    import pandas as pd


_BY_HEAD_AND_ROW = ("layer_norm", "constant_norm_rescale")


class ByHead(nn.Module):
    """One dictionary of width d_head as a dictionary of all heads: a latent per head and entry.

    Latent ``head * d_sae + i`` is latent ``i`` at that head. So what a latent does at one head is
    never mixed up with what it does at another.

    Args:
        dictionary: of width d_head.
        n_heads: heads of the layer.

    Raises:
        ArgumentError: the dictionary normalises every activation by itself.
    """

    def __init__(self, dictionary: Any, n_heads: int) -> None:
        super().__init__()
        given = dictionary.cfg
        kind = getattr(given, "normalize_activations", "none")
        if kind in _BY_HEAD_AND_ROW:
            raise ArgumentError(
                f"expected a dictionary that reads heads as they are, got "
                f"normalize_activations={kind!r}; set its cfg.metadata.hook_head_index to read it "
                "at one head"
            )
        self.dictionary, self.n_heads = dictionary, n_heads
        self.n_latents = len(dictionary.W_dec)
        self.cfg = SimpleNamespace(
            d_in=given.d_in * n_heads,
            d_sae=self.n_latents * n_heads,
            metadata=given.metadata,
            normalize_activations="none",
            reshape_activations="hook_z",
            architecture=getattr(given, "architecture", lambda: type(dictionary).__name__),
        )

    @property
    def W_dec(self) -> Float[Tensor, "latent width"]:
        """The decoder's rows, each in the columns of its head."""
        return torch.block_diag(*[self.dictionary.W_dec] * self.n_heads)

    def encode(self, x: Float[Tensor, "*batch head d_head"]) -> Float[Tensor, "*batch latent"]:
        """Latents of every head, one head after the other."""
        found = self.dictionary.encode(x)
        return (found.to_dense() if found.is_sparse else found).flatten(-2)

    def decode(self, latents: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch width"]:
        """All heads, joined."""
        return self.dictionary.decode(latents.unflatten(-1, (self.n_heads, -1))).flatten(-2)


def by_head(model: HookedTST, dictionary: Any) -> Any:
    """The dictionary itself, or as :class:`ByHead` where it reads q, k, v or z head by head."""
    check_dictionary(dictionary)
    cfg = getattr(dictionary, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    hook = getattr(metadata, "hook_name", None) or ""
    single = (
        bool(hook)
        and model.point(hook).joins
        and getattr(metadata, "hook_head_index", None) is None
        and getattr(cfg, "d_in", None) == model.cfg.d_head
        and model.cfg.n_heads > 1
    )
    return ByHead(dictionary, model.cfg.n_heads) if single else dictionary


_BY_ROW = ("layer_norm", "constant_norm_rescale")  # normalisations whose scale differs by position


@dataclass(frozen=True)
class Place:
    """The hooks of a dictionary.

    Args:
        reads: hook point whose activation is encoded.
        writes: hook point that the decoder's output stands for; differs for transcoders.
        head: the one head that is encoded where activations have a head axis, or None.
    """

    reads: str
    writes: str
    head: int | None = None

    @property
    def layer(self) -> int | None:
        """The block to start from for an edit; None where the whole model has to run."""
        return layer_of(self.writes) if self.writes.startswith("blocks.") else None

    @property
    def stop(self) -> int | None:
        """The layer that a run may stop before and still give what is read."""
        layer = layer_of(self.reads) if self.reads.startswith("blocks.") else None
        if layer is not None:
            return layer + 1
        whole = ("head", "ln_final", "encoder", "decoder", "hook_encoded", "hook_decoder")
        return None if self.reads.startswith(whole) else 0


def place_of(model: HookedTST, dictionary: Any) -> Place:
    """The hooks of a dictionary, checked against the model.

    Raises:
        ArgumentError: its metadata name no hook.
        UnknownHookError: the model has no such hook point.
        HookError: the hook point cannot fire as the model is set.
    """
    metadata = getattr(getattr(dictionary, "cfg", None), "metadata", None)
    reads = getattr(metadata, "hook_name", None)
    if not reads:
        raise ArgumentError(
            "expected a dictionary that knows its hook point, got cfg.metadata.hook_name=None; "
            'set it: sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"'
        )
    writes = getattr(metadata, "hook_name_out", None) or reads
    model.require_live([reads, writes])
    if writes.startswith(("head", "ln_final")):
        raise HookError(f"{writes} comes after the trunk: it has no positions to read latents at")
    head = getattr(metadata, "hook_head_index", None)
    return Place(reads, writes, None if head is None else int(head))


@dataclass(frozen=True)
class Batch:
    """Latents of a batch of series.

    Args:
        latents: [row, pos, latent], zero at padded positions.
        observed: bool [row, pos], False where a position holds padding.
        inputs: what was encoded, [row, pos, ...].
        state: what crosses the trunk.
        rows_per_series: 1, or the channel count of channel-independent models.
    """

    latents: Float[Tensor, "row pos latent"]
    observed: Bool[Tensor, "row pos"]
    inputs: Float[Tensor, "row pos *feature"]
    state: TrunkState
    rows_per_series: int


@torch.no_grad()
def encode(model: HookedTST, dictionary: Any, place: Place, data: TimeSeriesData) -> Batch:
    """Run the model as far as needed and encode what the dictionary reads.

    Raises:
        SeriesShapeError: the activation has no positions, or not the width of the dictionary.
    """
    series, mask = on_device(model, data)
    _, state = model.embed_series(series, mask)
    _, cache = model.run_with_cache(
        series, mask=mask, names_filter=place.reads, stop_at_layer=place.stop
    )
    found = cache[place.reads]
    if found.ndim not in (3, 4):
        raise SeriesShapeError(
            f"expected an activation [row, pos, ...] at {place.reads}, got {list(found.shape)}"
        )
    found = found if place.head is None else found[:, :, place.head]
    width = found[0, 0].numel()
    joined = getattr(dictionary.cfg, "reshape_activations", "none") == "hook_z"
    expected = getattr(dictionary.cfg, "d_in", width)
    if width != expected or (found.ndim == 4 and not joined):
        raise SeriesShapeError(
            f"expected activations of width d_in={expected} at {place.reads}, got "
            f"{list(found.shape[2:])}; was the dictionary trained on another model or hook, or on "
            "single heads (metadata hook_head_index)?"
        )
    weights = next(iter(dictionary.parameters()), found)
    latents = dictionary.encode(found.to(weights)).to(found)
    observed = model.observed_at(place.reads, state)
    if observed is None:
        observed = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    latents = torch.where(observed[:, :, None], latents, torch.zeros_like(latents))
    return Batch(latents, observed, found, state, len(found) // len(data))


def on_device(model: HookedTST, data: TimeSeriesData) -> tuple[Tensor, Tensor | None]:
    """Series and mask where the model is, in its dtype."""
    series = data.series.to(device=model.cfg.device, dtype=model.cfg.dtype)
    return series, None if data.mask is None else data.mask.to(series.device)


@torch.no_grad()
def directions(dictionary: Any, chunk: int = 1024) -> Float[Tensor, "latent d_in"]:
    """What one unit of every latent adds to the activation: ``decode(e_i) - decode(0)``.

    A normalisation of the input by position is left out; :func:`scale` gives it.
    """
    check_dictionary(dictionary)
    weights: Tensor = dictionary.W_dec
    n_latents = len(weights)
    plain = copy.copy(dictionary)  # shares the weights; only its functions below are replaced
    plain.run_time_activation_norm_fn_out = lambda x: x
    plain.reshape_fn_out = lambda x, d_head: x
    plain.d_head = None  # sae-lens sets it when z is first encoded
    zero = plain.decode(torch.zeros(1, n_latents, dtype=weights.dtype, device=weights.device))
    parts = []
    for start in range(0, n_latents, chunk):
        size = min(chunk, n_latents - start)
        one_hot = torch.zeros(size, n_latents, dtype=weights.dtype, device=weights.device)
        one_hot[torch.arange(size), start + torch.arange(size)] = 1
        parts.append(plain.decode(one_hot) - zero)
    return torch.cat(parts)


@torch.no_grad()
def scale(
    dictionary: Any, inputs: Float[Tensor, "row pos *feature"]
) -> Float[Tensor, "row pos"] | None:
    """By how much a dictionary that normalises its input multiplies its output, or None for 1."""
    kind = getattr(dictionary.cfg, "normalize_activations", "none")
    if kind not in _BY_ROW:
        return None
    flat = inputs.flatten(2)
    if kind == "layer_norm":
        return flat.std(-1)
    return flat.norm(dim=-1) / flat.shape[-1] ** 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Activity:
    """Activations of latents at every (series, channel, position).

    Args:
        values: sparse [slot, latent]; slot = (series * channel + channel) * pos + pos, where the
            channel axis has one entry unless every channel goes through the trunk by itself.
        observed: bool [slot]; padded positions are False, hold no activation and never count.
        n_series: series.
        n_channels: rows of the trunk per series.
        n_pos: positions.

    Example:
        >>> from scipy.sparse import csc_matrix
        >>> values = csc_matrix(np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]]))
        >>> activity = Activity(values, np.array([True, True, False, True]), 2, 1, 2)
        >>> activity.density, activity.of(0).shape
        (array([0.66666667, 0.33333333]), (2, 1, 2))
    """

    values: Any  # a csc_matrix, which scipy types too loosely to be of use
    observed: Bool[np.ndarray, " slot"]
    n_series: int
    n_channels: int
    n_pos: int

    least: ClassVar[float] = 0.0  # what is not above it is never among the strongest

    def __post_init__(self) -> None:
        slots = self.n_series * self.n_channels * self.n_pos
        if self.values.shape[0] != slots or self.observed.shape != (slots,):
            raise ArgumentError(
                f"expected {slots} slots ({self.n_series} series x {self.n_channels} channels x "
                f"{self.n_pos} positions), got {self.values.shape[0]} of activations and "
                f"{self.observed.shape[0]} of the mask"
            )
        if not self.observed.any():
            raise ArgumentError("expected at least one observed position, got none")

    @property
    def n_latents(self) -> int:
        """Latents of the dictionary."""
        return self.values.shape[1]

    @property
    def n_observed(self) -> int:
        """Positions that are not padding."""
        return int(self.observed.sum())

    @property
    def density(self) -> Float[np.ndarray, " latent"]:
        """Share of the observed positions at which each latent is active."""
        return np.diff(self.values.indptr) / self.n_observed

    @property
    def l0(self) -> float:
        """Mean number of active latents per observed position."""
        return self.values.nnz / self.n_observed

    def column(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots at which a latent is active, in rising order, and its activations there."""
        first, last = self.values.indptr[latent], self.values.indptr[latent + 1]
        return self.values.indices[first:last], self.values.data[first:last]

    def of(self, latent: Any) -> Float[np.ndarray, "series channel pos"]:
        """A latent's activation over time in every series; NaN where it is padding.

        Raises:
            ArgumentError: there is no such latent.
        """
        self.check(latent)
        slots, values = self.column(latent)
        dense = np.where(self.observed, 0.0, np.nan)
        dense[slots] = values
        return dense.reshape(self.n_series, self.n_channels, self.n_pos)

    def check(self, latent: Any) -> None:
        """Raise :class:`ArgumentError` unless there is such a latent."""
        if isinstance(latent, bool) or not isinstance(latent, int | np.integer):
            raise ArgumentError(f"expected a latent as an integer, got {latent!r}")
        if not 0 <= latent < self.n_latents:
            raise ArgumentError(f"expected a latent in 0..{self.n_latents - 1}, got {latent}")

    def strongest(self) -> Float[np.ndarray, "series latent"]:
        """The largest activation of every latent in every series, over observed positions."""
        per_series = self.n_channels * self.n_pos
        out = np.full((self.n_series, self.n_latents), -np.inf, dtype=np.float32)
        counts = np.zeros((self.n_series, self.n_latents), dtype=np.int32)
        column = np.repeat(np.arange(self.n_latents), np.diff(self.values.indptr))
        series = self.values.indices // per_series
        np.maximum.at(out, (series, column), self.values.data)
        np.add.at(counts, (series, column), 1)
        # Where a latent is silent at some observed position, that zero is a candidate too.
        seen = self.observed.reshape(self.n_series, per_series).sum(1)
        silent = counts < seen[:, None]
        out[silent] = np.maximum(out[silent], 0)
        out[seen == 0] = 0
        return out

    def slot(self, index: int | np.integer) -> tuple[int, int, int]:
        """(series, channel, position) of a slot."""
        row, pos = divmod(int(index), self.n_pos)
        return row // self.n_channels, row % self.n_channels, pos

    def places(
        self, slots: Int[np.ndarray, " slot"]
    ) -> tuple[Int[np.ndarray, " slot"], Int[np.ndarray, " slot"], Int[np.ndarray, " slot"]]:
        """(series, channel, position) of slots."""
        row, pos = np.divmod(slots.astype(np.int64), self.n_pos)
        return *np.divmod(row, self.n_channels), pos

    def __repr__(self) -> str:
        return (
            f"Activity(latent={self.n_latents}, series={self.n_series}, channel={self.n_channels}, "
            f"pos={self.n_pos}, l0={self.l0:.2f})"
        )


def activity_of(
    model: HookedTST,
    dictionary: Any,
    data: TimeSeriesData,
    *,
    place: Place | None = None,
    read: Callable[[Batch], Tensor] | None = None,
    batch_size: int = 128,
    progress: bool = False,
) -> Activity:
    """Activations of every latent over a data set.

    Args:
        model: the model that the dictionary belongs to.
        dictionary: an SAE of sae-lens, or a codebook.
        data: series, with their mask where they are padded.
        place: its hooks, where they are not in its metadata.
        read: what to keep of a batch, [row, pos, unit]; the latents where None.
        batch_size: series per forward pass.
        progress: show a progress bar.

    Raises:
        ArgumentError: no series, or a dictionary without a hook.
        SeriesShapeError: activations that are not the dictionary's.
    """
    if not len(data):
        raise ArgumentError("data: expected at least one series, got none")
    dictionary = by_head(model, dictionary)
    place = place or place_of(model, dictionary)
    parts: list[csr_matrix] = []
    observed: list[np.ndarray] = []
    shape = (1, 1)
    starts = range(0, len(data), batch_size)
    for start in tqdm(starts, desc="latents", disable=not progress, leave=False):
        batch = encode(model, dictionary, place, data[start : start + batch_size])
        kept = batch.latents if read is None else read(batch)
        kept = torch.where(batch.observed[:, :, None], kept, torch.zeros_like(kept))
        parts.append(csr_matrix(kept.flatten(0, 1).detach().float().cpu().numpy()))
        observed.append(batch.observed.flatten().cpu().numpy())
        shape = batch.rows_per_series, kept.shape[1]
    values: Any = vstack(parts, format="csc")
    values.sort_indices()
    return Activity(values, np.concatenate(observed), len(data), *shape)


Spans = tuple[tuple[int, int], ...]


def spans_of(model: HookedTST, n_pos: int, n_time: int, spans: Spans | None = None) -> Spans:
    """(first, one past last) sample that every position was embedded from.

    Raises:
        ArgumentError: the front end is a custom one, so that ``spans`` has to say it, or
            ``spans`` does not fit.
    """
    if spans is None:
        found = [model.time_span(pos, n_time) for pos in range(n_pos)]
        return tuple((part.start, part.stop) for part in found)
    given = tuple((int(first), int(last)) for first, last in spans)
    if len(given) != n_pos or any(not 0 <= a < b <= n_time for a, b in given):
        raise ArgumentError(
            f"expected spans of {n_pos} positions as (first, one past last) sample within "
            f"0..{n_time}, got {len(given)}: {str(given[:3])[1:-1]} ..."
        )
    return given


def cells_of(model: HookedTST, n_pos: int, n_time: int) -> Spans:
    """(first, one past last) sample that figures draw every position at."""
    found = [model.time_cell(pos, n_time) for pos in range(n_pos)]
    return tuple((part.start, part.stop) for part in found)


@dataclass(frozen=True, eq=False)
class Window:
    """One stretch of one series.

    Args:
        series: index of the series in the data.
        channel: the channel that was read; None where the model mixes channels.
        pos: position of the trunk.
        start: first sample that the position was embedded from.
        stop: one past the last.
        activation: of the latent at this position.
        label: class name of the series, or None.
        values: the whole raw series [channel, time], NaN where it is padding.
        over_time: activation of the latent at every position of this row, NaN at padding.
        cells: samples to draw every position at.
    """

    series: int
    channel: int | None
    pos: int
    start: int
    stop: int
    activation: float
    label: str | None
    values: Float[np.ndarray, "channel time"] = field(repr=False)
    over_time: Float[np.ndarray, " pos"] = field(repr=False)
    cells: Spans = field(repr=False)


@dataclass(frozen=True, eq=False)
class Windows(Result):
    """The windows where a latent is strongest, strongest first.

    Args:
        latent: which latent.
        windows: the windows.
        hook: where the latent lives.
    """

    latent: int
    windows: tuple[Window, ...]
    hook: str = ""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per window: series, channel, pos, start, stop, activation, label."""
        import pandas as pd

        names = ("series", "channel", "pos", "start", "stop", "activation", "label")
        rows = [[getattr(window, name) for name in names] for window in self.windows]
        return pd.DataFrame(rows, columns=list(names)).rename_axis("rank")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        return self.windows[index]

    def __repr__(self) -> str:
        shown = ", ".join(f"series {w.series} [{w.start}:{w.stop}]" for w in self.windows[:4])
        more = ", ..." if len(self.windows) > 4 else ""
        return f"Windows(latent {self.latent}, {len(self.windows)}: {shown}{more})"


def top_slots(
    activity: Activity, latent: int, n: int | None, per_row: int | None = 1
) -> Int[np.ndarray, " slot"]:
    """The ``n`` slots where a latent is strongest, strongest first; all where ``n`` is None.

    One per row (series, or series and channel) by default, since neighbouring positions of one
    series see nearly the same samples; ``per_row=None`` for any number. Ties go to the earlier
    slot.
    """
    slots, values = activity.column(latent)
    order = np.lexsort((slots, -values))
    order = order[values[order] > activity.least]
    if per_row is not None:
        rows = slots[order] // activity.n_pos
        by_row = np.argsort(rows, kind="stable")  # keeps the order of strength within a row
        nth = np.empty(len(rows), dtype=np.int64)
        nth[by_row] = np.arange(len(rows)) - np.searchsorted(rows[by_row], rows[by_row])
        order = order[nth < per_row]
    return slots[order[:n]]


def top_windows(
    activity: Activity,
    data: TimeSeriesData,
    spans: Spans,
    cells: Spans,
    latent: Any,
    n: Any,
    hook: str = "",
) -> Windows:
    """The ``n`` windows where a latent is strongest, at most one per series (and channel).

    Raises:
        ArgumentError: no such latent, or n below 1.
    """
    activity.check(latent)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError(f"expected n of at least 1, got {n!r}")
    dense = activity.of(latent)
    found = []
    for slot in top_slots(activity, latent, n):
        series, channel, pos = activity.slot(slot)
        start, stop = spans[pos]
        found.append(
            Window(
                series=series,
                channel=channel if activity.n_channels > 1 else None,
                pos=pos,
                start=start,
                stop=stop,
                activation=float(dense[series, channel, pos]),
                label=label_of(data, series),
                values=raw_series(data, series),
                over_time=dense[series, channel],
                cells=cells,
            )
        )
    return Windows(int(latent), tuple(found), hook)


def label_of(data: TimeSeriesData, series: int) -> str | None:
    """Class name of a series, or None where there are no labels."""
    return None if data.labels is None else data.class_names[int(data.labels[series])]


def raw_series(data: TimeSeriesData, series: int) -> Float[np.ndarray, "channel time"]:
    """One series as it was given, NaN where it is padding."""
    values = data.series[series].double().cpu().numpy()
    if data.mask is None:
        return values
    return np.where(data.mask[series].cpu().numpy()[None], values, np.nan)


def shapes(
    data: TimeSeriesData, rows: Sequence[tuple[int, int | None, int]], length: int, spans: Spans
) -> Float[np.ndarray, "window sample"]:
    """Equally long raw windows around positions, each channel centred on the data's mean.

    Windows that hold padding are left out.

    Args:
        data: the series.
        rows: (series, channel or None for all, position).
        length: samples; the window is centred on the position and shifted to lie in the series.
        spans: samples of every position.
    """
    values = data.series.double().cpu().numpy()
    seen = None if data.mask is None else data.mask.cpu().numpy()
    if seen is None:
        mean = values.mean((0, 2))[:, None]
        spread = values.std((0, 2))[:, None]
    else:
        masked = np.where(seen[:, None], values, np.nan)
        mean, spread = np.nanmean(masked, (0, 2))[:, None], np.nanstd(masked, (0, 2))[:, None]
    spread = np.where(spread > 0, spread, 1)
    found = []
    for series, channel, pos in rows:
        centre = sum(spans[pos]) // 2
        start = min(max(centre - length // 2, 0), values.shape[2] - length)
        part = slice(start, start + length)
        if seen is not None and not seen[series, part].all():
            continue
        window = ((values[series] - mean) / spread)[:, part]
        found.append((window if channel is None else window[channel]).ravel())
    size = length * (1 if rows and rows[0][1] is not None else values.shape[1])
    return np.array(found).reshape(len(found), size)


class Worlds:
    """A clean run to start edits from.

    Args:
        model: the model.
        dictionary: the SAE or codebook.
        data: the series.
        place: the dictionary's hooks; from its metadata where None.
        batch_size: series, and worlds, per forward pass.
    """

    def __init__(
        self,
        model: HookedTST,
        dictionary: Any,
        data: TimeSeriesData,
        *,
        place: Place | None = None,
        batch_size: int = 128,
    ) -> None:
        self.model = model
        dictionary = by_head(model, dictionary)
        self.place = place or place_of(model, dictionary)
        self.directions = directions(dictionary).to(device=model.cfg.device, dtype=model.cfg.dtype)
        self.series, self.mask = on_device(model, data)
        self.batch_size = batch_size
        latents, observed, scales, outputs, entering = [], [], [], [], []
        for start in range(0, len(data), batch_size):
            part = data[start : start + batch_size]
            batch = encode(model, dictionary, self.place, part)
            latents.append(batch.latents)
            observed.append(batch.observed)
            factor = scale(dictionary, batch.inputs)
            scales.append(torch.ones_like(batch.latents[..., 0]) if factor is None else factor)
            with torch.no_grad():
                series, mask = on_device(model, part)
                outputs.append(central(model, model(series, mask=mask)))
                if self.place.layer is not None:
                    entering.append(model(series, mask=mask, stop_at_layer=self.place.layer))
            self.rows = batch.rows_per_series
        self.latents = torch.cat(latents)  # [row, pos, latent]
        self.observed = torch.cat(observed)  # [row, pos]
        self.scales = torch.cat(scales)  # [row, pos]
        self.output = torch.cat(outputs)  # [series, ...]
        self.entering = torch.cat(entering) if entering else None
        with torch.no_grad():
            _, self.state = model.embed_series(self.series, self.mask)

    def row_index(self, series: Int[Tensor, " world"]) -> Int[Tensor, " row"]:
        """Rows of the trunk that belong to these series, in order."""
        offsets = torch.arange(self.rows, device=series.device)
        return (series[:, None] * self.rows + offsets).flatten()

    @torch.no_grad()
    def outputs(
        self,
        series: Int[Tensor, " world"],
        amounts: Float[Tensor, "row pos"],
        latents: Int[Tensor, " world"],
    ) -> Float[Tensor, " world *output"]:
        """Outputs with ``amounts`` of a latent's direction added.

        Args:
            series: which series each world starts from.
            amounts: activation to add at each row and position of these worlds; padded positions
                are left alone whatever is asked.
            latents: whose direction, one per world.
        """
        parts = []
        amounts = amounts.unflatten(0, (-1, self.rows))
        for start in range(0, len(series), self.batch_size):
            at = slice(start, start + self.batch_size)
            rows = self.row_index(series[at])
            amount = amounts[at].flatten(0, 1) * self.scales[rows] * self.observed[rows]
            vector = self.directions[latents[at]].repeat_interleave(self.rows, 0)
            parts.append(self._run(series[at], rows, amount[:, :, None] * vector[:, None]))
        return torch.cat(parts)

    def _run(self, series: Tensor, rows: Tensor, change: Tensor) -> Tensor:
        head = self.place.head

        def add(activation: Tensor, hook: Any) -> Tensor:
            del hook
            if head is None:
                return activation + change.view_as(activation)
            edited = activation.clone()
            edited[:, :, head] += change
            return edited

        hooks = [(self.place.writes, add)]
        if self.entering is None:
            mask = None if self.mask is None else self.mask[series]
            output = self.model.run_with_hooks(self.series[series], mask=mask, fwd_hooks=hooks)
            return central(self.model, output)
        output = self.model.run_with_hooks(
            self.entering[rows],
            start_at_layer=self.place.layer,
            state=self.state.rows(series),
            fwd_hooks=hooks,
        )
        return central(self.model, output)


def central(model: HookedTST, output: Tensor) -> Tensor:
    """Logits and forecasts as they are; of a forecast's quantiles or distribution, the middle.

    That is the median: the middle quantile (the mean of the two in the middle where there is none)
    or the location of a normal or Student's t distribution; the mean of a negative binomial.

    Args:
        model: whose output it is.
        output: [*world, class], [*world, channel, horizon], or the latter with quantiles or
            parameters last; one world axis.

    Raises:
        SeriesShapeError: other axes.
    """
    if output.ndim in (2, 3):
        return output
    if output.ndim != 4:
        raise SeriesShapeError(
            "expected outputs [batch, class] or [batch, channel, horizon], with quantiles or "
            f"parameters last where there are any, got {list(output.shape)}"
        )
    distribution = getattr(model.cfg.head, "distribution", None)
    if distribution == "negative_binomial":
        count, logits = output.unbind(-1)
        return count * logits.exp()
    if distribution is not None:
        return output[..., -2]  # (..., loc, scale)
    n = output.shape[-1]
    return output[..., (n - 1) // 2 : n // 2 + 1].mean(-1)
