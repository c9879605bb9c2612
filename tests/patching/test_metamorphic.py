"""What must not change a result, or must change it in a known way, over families, sites, analyses.

``TSTLENS_FUZZ_SECONDS=3600`` draws at random for that long; without it, the same few draws are
made every time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import tstlens
from tests.model import test_cache_sums as own
from tests.patching.conftest import CONFIGS, randomised
from tstlens import patching
from tstlens.errors import TstlensError
from tstlens.model import HookedTST
from tstlens.patching import Site
from tstlens.patching.sites import locate, site_names

SECONDS = float(os.environ.get("TSTLENS_FUZZ_SECONDS", "0"))
QUIET = {"progress": False}
N = 4  # pairs


@dataclass(frozen=True)
class World:
    """A model in float64, clean and corrupted series, and a metric that is linear in the output."""

    model: HookedTST
    clean: Tensor
    corrupted: Tensor
    weights: Tensor
    mask: Tensor | None = None
    scale: float = 1.0
    shift: float = 0.0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # of hypothesis, else 300 lines
        printer.text("World")

    def metric(self, output: Tensor) -> Tensor:
        return self.scale * (output * self.weights).flatten(1).sum(1) + self.shift

    def of(self, rows: list[int]) -> World:
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, clean=self.clean[rows], corrupted=self.corrupted[rows], mask=mask)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.model, self.clean, self.corrupted

    @property
    def masks(self) -> dict[str, Any]:
        return {"clean_mask": self.mask, "corrupted_mask": self.mask, **QUIET}


# ---------------------------------------------------------------- families


def _converted(module: str, make: Callable[[Any, Any], Any], **hints: Any) -> Callable[..., Any]:
    """Of one entry of a family's GRID: the model, and what makes series for it."""

    def made(number: int) -> tuple[HookedTST, Callable[[], Tensor]]:
        room = importlib.import_module(f"tests.zoo.test_{module}")
        entry = room.GRID[number % len(room.GRID)]
        source = make(room, entry).double()
        given = {name: h(source, entry) if callable(h) else h for name, h in hints.items()}
        model = tstlens.convert(source, **{k: v for k, v in given.items() if v is not None})
        return model.double(), functools.partial(_series, room, model)

    return made


def _series(room: Any, model: HookedTST) -> Tensor:
    """Walks of the family's own, of the channels and samples that the model takes."""
    if room.__name__.endswith("hf_tst"):
        return room.series(model, N)
    sizes = {"n_channels": model.cfg.n_channels, "n_time": model.cfg.n_time}
    if hasattr(room, "series"):
        known = {name: size for name, size in sizes.items() if size is not None}
        most = getattr(model.cfg.embed, "context_length", 99)
        return room.series(batch=N, **known).double()[..., -most:]
    return 3 * torch.randn(N, sizes["n_channels"], sizes["n_time"] or room.TIME).double() + 2


def _pair(room: Any, entry: Any) -> Any:
    return room.restated(entry[0], **entry[1])


FAMILIES: dict[str, Callable[[int], tuple[HookedTST, Callable[[], Tensor]]]] = {
    "chronos-2": _converted(
        "chronos_2", lambda room, o: room.make(**o), n_channels=2, num_output_patches=2
    ),
    "chronos-bolt": _converted("chronos_bolt", lambda room, o: room.make(**o), n_channels=2),
    "chronos-t5": _converted(
        "chronos_t5",
        lambda room, o: room.make(**o[1]),
        n_channels=2,
        decoder_steps=lambda source, entry: entry[0],
    ),
    "hf-tst": _converted("hf_tst", lambda room, o: room.make(o[0], **o[1])),
    "itransformer": _converted(
        "itransformer",
        _pair,
        n_channels=lambda source, entry: 5 if entry[0] == "library" else None,
        n_marks=lambda source, entry: entry[1].get("n_marks"),
    ),
    "moment": _converted(
        "moment",
        lambda room, o: room.restated(**o),
        n_channels=lambda source, entry: (
            importlib.import_module("tests.zoo.test_moment").channels(source).get("n_channels")
        ),
    ),
    "mvts": _converted("mvts", lambda room, o: room.restated(*o)),
    "patchtst": _converted("patchtst", lambda room, o: room.a_source(o[0], **o[1])),
    "patchtst-original": _converted(
        "patchtst_original",
        _pair,
        n_channels=lambda source, entry: 3 if entry[0] == "library" else None,
    ),
    "timesfm": _converted("timesfm", lambda room, o: room.make(**o), n_channels=2),
    "timesfm-2.5": _converted("timesfm_25", lambda room, o: room.make(**o), n_channels=2),
    "tsai": _converted("tsai", _pair),
    "small ones of patching": lambda number: (
        randomised(list(CONFIGS.values())[number % len(CONFIGS)]).double(),
        lambda: torch.randn(N, 4, 10).double(),
    ),
}
N_OPTIONS = 24  # no GRID is longer


@functools.cache
def family(name: str, number: int) -> World:
    torch.manual_seed(0)
    model, series = FAMILIES[name](number)
    model.eval()
    clean, corrupted = series(), series()
    return World(model, clean, corrupted, torch.randn(model(clean[:1]).shape[1:]).double())


@st.composite
def worlds(draw: Any) -> World:
    """A family with one of its options, or a model of any block options."""
    if draw(st.integers(0, 3)) == 0:
        chosen = draw(own.options())
        torch.manual_seed(0)
        model = own.made(chosen).double().eval()
        clean, corrupted = torch.randn(2, N, 3, 12).double()
        return World(model, clean, corrupted, torch.randn(model(clean[:1]).shape[1:]).double())
    name, number = draw(st.sampled_from(sorted(FAMILIES))), draw(st.integers(0, N_OPTIONS - 1))
    note(f"{name}, option {number}")
    try:
        return family(name, number if SECONDS else 0)
    except pytest.skip.Exception:
        assume(False)
        raise


@st.composite
def grids(draw: Any, world: World, least: int = 0) -> tuple[Site, tuple[str, ...]]:
    """A site that the model has, some of its axes in any order, a part of what is not swept."""
    model = world.model
    model.set_use_attn_result(draw(st.booleans()))
    live = [name for name in site_names(model) if _fires(model, name)]
    site = Site(draw(st.sampled_from(live)))
    place = locate(model, site)
    axes = draw(st.permutations(place.axes))[: draw(st.integers(least, 2))]
    if draw(st.booleans()) or {"query", "key"} <= {*axes}:
        axes = [axis for axis in axes if axis != "feature"]
    axes = draw(st.permutations(["layer", *axes])) if place.layered else axes
    note(f"{site}, {axes}")
    return site, tuple(axes)


def _fires(model: HookedTST, name: str) -> bool:
    place = locate(model, Site(name))
    return model.why_silent(place.hook_name(place.layers[0])) is None


# ---------------------------------------------------------------- analyses, one row per pair

Grid = tuple[Site, tuple[str, ...]]


def _swept(result: Any) -> list[Tensor]:
    return [result.values, result.baseline, result.clean, result.effect()]


ANALYSES: dict[str, Callable[[World, Grid], list[Tensor]]] = {
    "sweep": lambda w, g: _swept(patching.sweep(*w.args, *g, w.metric, **w.masks)),
    "sweep in small chunks": lambda w, g: _swept(
        patching.sweep(*w.args, *g, w.metric, memory_mb=0.01, **w.masks)
    ),
    "sweep to 0": lambda w, g: _swept(patching.sweep(*w.args, *g, w.metric, "zero", **w.masks)),
    "attribution": lambda w, g: _swept(patching.attribution(*w.args, *g, w.metric, **w.masks)),
    "path of the site": lambda w, g: _swept(
        patching.attribution(*w.args, *g, w.metric, 3, path="site", **w.masks)
    ),
    "path of the input": lambda w, g: _swept(
        patching.attribution(*w.args, *g, w.metric, 3, path="input", **w.masks)
    ),
    "ablate": lambda w, g: _swept(
        patching.ablate(w.model, w.corrupted, *g, metric=w.metric, mask=w.mask, **QUIET)
    ),
    "windows": lambda w, g: _swept(
        patching.window_sweep(*w.args, w.metric, lengths=(3,), **w.masks)
    ),
    "influence": lambda w, g: [patching.head_influence(*w.args, **w.masks).values],
    "edges": lambda w, g: _swept(
        patching.edge_sweep(*w.args, w.metric, positions=False, **w.masks)
    ),
    "edge attribution": lambda w, g: _swept(
        patching.edge_attribution(*w.args, w.metric, **w.masks)
    ),
    "attention": lambda w, g: [
        (found := patching.attention(w.model, w.corrupted, w.mask, **QUIET)).pattern.nan_to_num(),
        found.entropy,
    ],
    "output": lambda w, g: [w.model(w.corrupted, mask=w.mask)],
}
OF_GRIDS = tuple(ANALYSES)[:7]
ESTIMATES = ("attribution", "path of the input")  # linear in what is replaced


def found(name: str, world: World, grid: Grid) -> list[Tensor]:
    """The analysis; where the model has no such thing, an error of ours, and the draw is over."""
    try:
        return [torch.as_tensor(part).detach() for part in ANALYSES[name](world, grid)]
    except TstlensError as error:
        event(f"{name}: refused")
        note(f"{name}: {error}")
        assume(False)
        raise


def same(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-9) -> None:
    left, right = ([part.detach() for part in parts] for parts in (left, right))
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        scale = max(1e-3, *(float(part.nan_to_num().abs().max()) for part in left if part.numel()))
        torch.testing.assert_close(
            one, other.to(one), rtol=0, atol=tolerance * scale, equal_nan=True
        )


# ---------------------------------------------------------------- relations


def rows(draw: Any, world: World) -> None:
    """Pairs in another order, some of them left out, some twice: each keeps its numbers."""
    chosen = draw(st.lists(st.integers(0, N - 1), min_size=1, max_size=N + 2), label="rows")
    world, grid = _padded(draw, world), draw(grids(world))
    name = draw(st.sampled_from(sorted(ANALYSES)), label="analysis")
    same([part[chosen] for part in found(name, world, grid)], found(name, world.of(chosen), grid))


def itself(draw: Any, world: World) -> None:
    """A run patched with itself stays what it is."""
    world, grid = replace(_padded(draw, world), clean=world.corrupted), draw(grids(world))
    names = {"sweep", "edges", "windows", *ESTIMATES, "edge attribution"}
    name = draw(st.sampled_from(sorted(names)), label="analysis")
    _, baseline, *_, effect = found(name, world, grid)
    scale = max(1.0, float(baseline.abs().max()))
    assert float(effect.abs().max()) <= 1e-9 * scale if effect.numel() else True


def scaled(draw: Any, world: World) -> None:
    """A metric times a number plus another gives values times the one plus the other."""
    a, b = draw(st.sampled_from([(2.0, 0.0), (-3.0, 7.0), (1e-3, -1.0), (1e4, 0.0)]), label="a, b")
    grid = draw(grids(world))
    names = {*ANALYSES} - {"influence", "attention", "output"}
    name = draw(st.sampled_from(sorted(names)), label="analysis")
    *values, effect = found(name, world, grid)
    expected = [*(a * part + b for part in values), a * effect]
    same(expected, found(name, replace(world, scale=a, shift=b), grid))


def padding(draw: Any, world: World) -> None:
    """What stands in padding is read by nothing."""
    grid, name = draw(grids(world)), draw(st.sampled_from(sorted(ANALYSES)), label="analysis")
    world = _padded(draw, world, always=True)
    assert world.mask is not None
    hidden = ~world.mask[:, None].expand_as(world.clean)
    fill = draw(st.sampled_from([0.0, 9e3, -1e-3, float("nan")]), label="fill")
    other = replace(
        world,
        clean=world.clean.masked_fill(hidden, fill),
        corrupted=world.corrupted.masked_fill(hidden, fill),
    )
    same(found(name, world, grid), found(name, other, grid))


def _padded(draw: Any, world: World, always: bool = False) -> World:
    """With padding at the end or at the start; the draw is over where the model takes none."""
    if not always and draw(st.sampled_from([True, True, False]), label="no padding"):
        return world
    n_time = world.clean.shape[2]
    least = draw(st.integers(1, n_time), label="shortest")
    lengths = torch.linspace(n_time, least, N).long()[:, None]
    mask = torch.arange(n_time) < lengths
    if draw(st.booleans(), label="at the start"):
        mask = mask.flip(1)
    try:
        world.model(world.clean, mask=mask)
    except TstlensError as error:
        event("padding: refused")
        note(str(error))
        assume(False)
    return replace(world, mask=mask)


def parts(draw: Any, world: World) -> None:
    """A part of the grid, swept in another order of axes, is that part of the whole."""
    world, (site, axes) = _padded(draw, world), draw(grids(world, 1))
    assume(axes)
    name = draw(st.sampled_from(_beside_paths(world, site, OF_GRIDS)), label="analysis")
    whole = found(name, world, (site, axes))[0]
    axis = draw(st.sampled_from(axes), label="axis")
    size = whole.shape[1 + axes.index(axis)]
    if axis == "layer":
        layers = locate(world.model, site).layers
        number = draw(st.integers(0, size - 1))
        part, rest = replace(site, layer=layers[number]), [a for a in axes if a != "layer"]
        expected = whole.select(1 + axes.index(axis), number)
    else:
        kept = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1), label="kept"))
        part, rest = replace(site, **{axis: kept}), list(axes)
        expected = whole.index_select(1 + axes.index(axis), torch.tensor(kept))
    order = draw(st.permutations(rest), label="order")
    again = found(name, world, (part, tuple(order)))[0]
    same([expected], [again.permute(0, *(1 + order.index(a) for a in rest))])


def _beside_paths(world: World, site: Site, names: tuple[str, ...]) -> list[str]:
    """Without the analyses whose path ends where the grid says."""
    in_trunk = locate(world.model, site).in_trunk
    return [name for name in names if "path" not in name or ("input" in name and in_trunk)]


def sums(draw: Any, world: World) -> None:
    """Estimates are linear in what is replaced: those of the parts add up to that of the whole."""
    world, (site, axes) = _padded(draw, world), draw(grids(world, 1))
    inner = [axis for axis in axes if axis != "layer"]
    assume(inner)
    name = draw(st.sampled_from(_beside_paths(world, site, ESTIMATES)), label="analysis")
    axis = draw(st.sampled_from(inner), label="axis")
    fine = found(name, world, (site, axes))[3]
    coarse = found(name, world, (site, tuple(a for a in axes if a != axis)))[3]
    summed = fine.sum(1 + axes.index(axis))
    scale = max(1e-3, float(fine.abs().sum(1 + axes.index(axis)).max()))
    assert float((summed - coarse).abs().max()) <= 1e-9 * scale


def slopes(draw: Any, world: World) -> None:
    """An estimate without steps is the derivative of moving the site, by finite differences."""
    site, _ = draw(grids(world))
    place = locate(world.model, site)
    layer = draw(st.sampled_from(place.layers), label="layer")
    name = place.hook_name(layer if place.layered else None)
    effect = found("attribution", world, (Site(name), ()))[3]
    before, after = _slopes(world, name, 1e-6)
    if float((before - after).abs().max()) > 1e-3 * float(after.abs().max()):
        event("no derivative here")  # a kink, a bin, a maximum
        assume(False)
    same([effect], [(before + after) / 2], 3e-3)


@torch.no_grad()
def _slopes(world: World, name: str, step: float) -> tuple[Tensor, Tensor]:
    """On this side of the corrupted run and on the clean run's."""
    _, clean = world.model.run_with_cache(world.clean, names_filter=[name])

    def moved(share: float) -> Tensor:
        def mix(activation: Tensor, hook: Any) -> Tensor:
            way = torch.where(activation == clean[name], 0.0, clean[name] - activation)
            return activation + share * way

        return world.metric(world.model.run_with_hooks(world.corrupted, fwd_hooks=[(name, mix)]))

    here = moved(0.0)
    return (here - moved(-step)) / step, (moved(step) - here) / step


def test_what_the_embedding_does_not_reach_has_a_slope_too():
    """A decoder's first layer, where it starts from what it is given and not from the series."""
    torch.manual_seed(0)
    model = own.made({"n_layers": 3, "n_decoder_layers": 2, "positions": "none", "seed": 0})
    clean, corrupted = 2 * torch.randn(2, N, 3, 12).double()
    world = World(model.double(), clean, corrupted, torch.randn(3, 4, 12).double())
    for name in ("decoder.0.hook_resid_pre", "decoder.0.attn.hook_q", "encoder.0.attn.hook_q"):
        effect = ANALYSES["attribution"](world, (Site(name), ()))[3]
        assert float(effect.abs().max()) > 1e-3
        same([effect], [sum(_slopes(world, name, 1e-6)) / 2], 1e-4)
        path = ANALYSES["path of the input"](world, (Site(name), ()))[3]
        assert bool(path.isfinite().all()) and float(path.abs().max()) > 1e-3


def everything(draw: Any, world: World) -> None:
    """The series, or all that goes on in front of the head, patched: the clean run."""
    model = world.model
    clean = model(world.clean)
    before = [
        name
        for name in model.hook_dict
        if model.why_silent(name) is None and name != "hook_series" and "head." not in name
    ]
    sites = [[Site("series")]]
    if not getattr(model.cfg.head, "not_negative", False):  # which goes by the series itself
        sites.append([Site(name) for name in before if model.point(name).layout])
    for chosen in sites:
        try:
            patched = patching.patch(*world.args, chosen)
        except TstlensError as error:
            note(str(error))
            assume(False)
            raise
        same([clean], [patched])


def dead(draw: Any, world: World) -> None:
    """A head whose output is read by nothing, and a neuron: no site in them has an effect."""
    model = world.model
    layer = draw(st.integers(0, model.cfg.n_layers - 1), label="layer")
    block, name = model.layers[layer], model.layer_name(layer)
    head = draw(st.integers(0, model.cfg.n_heads - 1), label="head")
    sites = ("z", "v", "pattern") if model.cfg.residual_attention else ("z", "v", "q", "k")
    site = draw(st.sampled_from([*sites, "mlp_post"]), label="site")
    grid = (
        Site(f"{name}.mlp.hook_post" if site == "mlp_post" else f"{name}.attn.hook_{site}"),
        ("feature" if site == "mlp_post" else "head",),
    )
    weight = block.mlp.W_out if site == "mlp_post" else block.attn.W_O
    analysis = draw(st.sampled_from(["sweep", "sweep to 0", "ablate", *ESTIMATES]))
    before = weight.detach().clone()
    with torch.no_grad():
        weight[head] = 0
    try:
        effect = found(analysis, world, grid)[3]
    finally:
        with torch.no_grad():
            weight.copy_(before)
    here = effect[:, head // (model.cfg.n_heads // effect.shape[1]) if site != "mlp_post" else head]
    if effect.shape[1] in (model.cfg.n_heads, model.cfg.d_mlp):  # keys of groups serve several
        assert float(here.abs().max()) <= 1e-9 * max(1.0, float(effect.abs().max()))


def channels(draw: Any, world: World) -> None:
    """Where channels are treated alike, their order is that of the results and no more."""
    model, n = world.model, world.clean.shape[1]
    order = draw(st.permutations(range(n)), label="order")
    output = model(world.clean).detach()
    assume(n > 1 and output.ndim > 2 and output.shape[1] == n)
    turned = model(world.clean[:, order])
    if not bool(((turned - output[:, order]).abs().max() <= 1e-9 * output.abs().max()).all()):
        event("channels are not alike")
        assume(False)
    world, grid = _padded(draw, world), draw(grids(world))
    name = draw(st.sampled_from([*OF_GRIDS, "windows"]), label="analysis")
    other = replace(
        world,
        clean=world.clean[:, order],
        corrupted=world.corrupted[:, order],
        weights=world.weights[order],
    )
    here, there = found(name, world, grid)[0], found(name, other, grid)[0]
    axes = ("channel", "time") if name == "windows" else grid[1]
    moved = {"channel"} | ({"pos", "query", "key"} if _channels_are_positions(model) else set())
    for number, axis in enumerate(axes):
        if axis in moved and here.shape[1 + number] in (n, 2 * n):  # a second pass comes after
            both = [*order, *(n + old for old in order)][: here.shape[1 + number]]
            here = here.index_select(1 + number, torch.tensor(both))
    same([here], [there], 1e-8)


def _channels_are_positions(model: HookedTST) -> bool:
    return model.cfg.positions_are == "channel"


def units(draw: Any, world: World) -> None:
    """Where the model takes out level and size, effects on a forecast are in the series' units."""
    a, b = draw(st.sampled_from([(4.0, 0.0), (1.0, -50.0), (0.5, 3.0)]), label="a, b")
    model = world.model
    try:
        out, other = (model(x).detach() for x in (world.corrupted, a * world.corrupted + b))
    except TstlensError as error:  # categories are among the channels
        note(str(error))
        assume(False)
        raise
    size = float(out.abs().max())
    gaps = {
        c: float((other - c * out - d).abs().max()) / size for c, d in ((a, b), (a, 0.0), (1.0, 0))
    }
    times, gap = min(gaps.items(), key=lambda entry: entry[1])
    if gap > 1e-4:
        event("units matter")
        assume(False)
    grid = draw(grids(world))
    assume(grid[0].name != "series" or draw(st.booleans()))
    name = draw(st.sampled_from(["sweep", "sweep in small chunks"]), label="analysis")
    moved = replace(world, clean=a * world.clean + b, corrupted=a * world.corrupted + b)
    effect, same_effect = found(name, world, grid)[3], found(name, moved, grid)[3]
    same([times * effect], [same_effect], max(1e-6, 300 * gap))


def reference(draw: Any, world: World) -> None:
    """A mean over other series knows neither their order nor how often all of them come."""
    grid = draw(grids(world))
    order = draw(st.permutations(list(range(N)) * draw(st.integers(1, 2))), label="order")

    def values(given: Tensor) -> list[Tensor]:
        try:
            return _swept(patching.sweep(*world.args, *grid, world.metric, "mean",
                                         reference=given, **QUIET))  # fmt: skip
        except TstlensError as error:
            note(str(error))
            assume(False)
            raise

    same(values(world.clean), values(world.clean[order]))


RELATIONS = (
    rows, itself, scaled, padding, parts, sums, slopes, everything, dead, channels, units, reference
)  # fmt: skip


@contextlib.contextmanager
def unchanged(model: HookedTST) -> Iterator[None]:
    """Nothing that a draw sets stays set, as models are kept."""
    before = model.cfg.use_attn_result
    yield
    model.set_use_attn_result(before)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
def test_relations_that_hold_for_every_model_and_site(relation):
    until = time.monotonic() + SECONDS / len(RELATIONS)

    @settings(
        max_examples=200 if SECONDS else 5,
        derandomize=not SECONDS,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def drawn(data):
        world = data.draw(worlds())
        with unchanged(world.model):
            relation(data.draw, world)

    drawn()
    while time.monotonic() < until:
        drawn()
