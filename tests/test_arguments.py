"""What is no argument is named before anything is computed: expected, got, what to do."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import tstlens
from tstlens import figures, patching, probing
from tstlens.arguments import (
    Count,
    Positive,
    Seed,
    Share,
    _hints,
    check_fields,
    check_slice,
    checked,
    configured,
    one_per_row,
    shown,
)
from tstlens.data import Pairs, TimeSeriesData
from tstlens.errors import ArgumentError, InputError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
from tstlens.shapes import Labels, Mask, Series

pytestmark = pytest.mark.usefixtures("no_shape_checks")


@pytest.fixture(scope="module")
def model() -> HookedTST:
    cfg = HookedTSTConfig(
        n_layers=2,
        d_model=8,
        n_heads=2,
        d_mlp=8,
        n_channels=2,
        embed=PerStepConfig(),
        head=HeadConfig("mean", n_classes=3),
    )
    return HookedTST(cfg)


@pytest.fixture(scope="module")
def data() -> TimeSeriesData:
    generator = torch.Generator().manual_seed(0)
    return TimeSeriesData(torch.randn(12, 2, 10, generator=generator), torch.arange(12) % 3)


@checked
def everything(
    model: HookedTST | None = None,
    series: Series | None = None,
    mask: Mask | None = None,
    labels: Labels | int | None = None,
    names: Sequence[str] = (),
    kind: Literal["a", "b"] = "a",
    kinds: Sequence[Literal["a", "b"]] = (),
    way: tuple[Literal["up", "down"], int] | None = None,
    n: Count = 1,
    shift: int = 0,
    seed: Seed = 0,
    memory_mb: Positive | None = None,
    level: Share = 0.95,
    strengths: Sequence[float] = (),
    path: str | Path = "",
    options: Mapping[str, Any] | None = None,
    metric: Callable[..., Tensor] | None = None,
    progress: bool = True,
    unknown: NotThere | None = None,  # type: ignore[name-defined]  # noqa: F821
) -> str:
    """One parameter of every kind there is."""
    return "ran"


SERIES = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"model": nn.Linear(1, 1)},
            ArgumentError,
            r"expected model as a HookedTST or None, got a Linear; load one with HookedTST\.from_",
        ),
        (
            {"series": SERIES.numpy()},
            SeriesValueError,
            r"a tensor of floats \[batch, channel, time\] or None, got ndarray float32 "
            r"\[2, 3, 4\]; try torch.as_tensor\(series\)",
        ),
        ({"series": SERIES.tolist()}, SeriesValueError, "got a list; try torch.as_tensor"),
        ({"series": TimeSeriesData(SERIES)}, SeriesValueError, "TimeSeriesData; try series.series"),
        ({"mask": [True]}, SeriesShapeError, r"a tensor of bools \[batch, time\] or None"),
        ({"labels": [0, 1]}, LabelError, r"ints \[batch\], an integer or None, got \[0, 1\]"),
        ({"names": "z"}, ArgumentError, r"a sequence of names, got 'z'; try names=\('z',\)"),
        ({"names": [1]}, ArgumentError, r"expected names as a sequence of names, got \[1\]"),
        ({"kind": 3}, ArgumentError, "expected kind as 'a' or 'b', got 3"),
        ({"kind": "aa"}, ArgumentError, "'a' or 'b', got 'aa'; did you mean 'a'"),
        ({"kinds": ["a", "c"]}, ArgumentError, r"a sequence of 'a' or 'b', got \['a', 'c'\]"),
        ({"way": ("left", 1)}, ArgumentError, r"a tuple \('up' or 'down', an integer\) or None"),
        ({"way": ("up", 1, 1)}, ArgumentError, r"got \('up', 1, 1\)"),
        ({"n": 2**31}, ArgumentError, "at least 1 and of at most 2147483647, got 2147483648"),
        ({"seed": 10**30}, ArgumentError, "of at most 9223372036854775807, got 1000000000"),
        ({"seed": 1e30}, ArgumentError, "seed as an integer of at least 0, got 1e"),
        ({"n": 0}, ArgumentError, "expected n as an integer of at least 1, got 0"),
        ({"n": True}, ArgumentError, "expected n as an integer of at least 1, got True"),
        ({"shift": "2"}, ArgumentError, "expected shift as an integer, got '2'"),
        ({"seed": -1}, ArgumentError, "expected seed as an integer of at least 0, got -1"),
        ({"memory_mb": 0}, ArgumentError, "memory_mb as a positive number or None, got 0"),
        ({"memory_mb": float("inf")}, ArgumentError, "positive number or None, got inf"),
        ({"level": 95}, ArgumentError, "expected level as a number between 0 and 1, got 95"),
        ({"strengths": [float("nan")]}, ArgumentError, r"finite numbers, got \[nan\]"),
        ({"strengths": np.ones((2, 2))}, ArgumentError, r"got ndarray float64 \[2, 2\]"),
        ({"strengths": {1.0, 2.0}}, ArgumentError, r"has no order, try sorted\(strengths\)"),
        ({"names": iter([1])}, ArgumentError, "a sequence of names, got a list_iterator"),
        ({"n": np.int64(0)}, ArgumentError, "integer of at least 1, got 0"),
        ({"n": torch.tensor(2.0)}, ArgumentError, r"at least 1, got Tensor float32 \[\]"),
        ({"path": None}, ArgumentError, "expected path as a string or a path, got None"),
        ({"options": ["x"]}, ArgumentError, r"expected options as a dict or None, got \['x'\]"),
        ({"metric": "prob"}, ArgumentError, "expected metric as a function or None, got 'prob'"),
        ({"progress": "no"}, ArgumentError, "expected progress as True or False, got 'no'"),
    ],
)
def test_an_argument_of_another_type_is_named(given, error, message):
    with pytest.raises(error, match=message):
        everything(**given)


ROOMS = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(tstlens.__path__, "tstlens.")
    if found.ispkg
]


def _public_functions() -> dict[str, Callable[..., Any]]:
    """Public functions, and public methods of public classes, of ours."""
    found: dict[str, Callable[..., Any]] = {}
    for room in ROOMS:
        for name in room.__all__:
            public = getattr(room, name)
            if not getattr(public, "__module__", "").startswith("tstlens"):
                continue
            parts = {name: public}
            if isinstance(public, type):
                lines = [kind for kind in public.__mro__ if kind.__module__.startswith("tstlens")]
                parts = {
                    f"{name}.{part}": getattr(value, "__func__", value)
                    for kind in reversed(lines)
                    for part, value in vars(kind).items()
                    if not part.startswith("_") or (part == "__init__" and not is_dataclass(public))
                }
            found |= {
                f"{room.__name__}.{part}": value
                for part, value in parts.items()
                if inspect.isfunction(value)
            }
    return found


def _choices(hint: Any) -> tuple[str, ...]:
    """Words that the hint of an argument lists."""
    inside = get_args(hint)
    if get_origin(hint) is Literal:
        return inside
    return tuple(word for part in inside for word in _choices(part))


def test_every_public_function_refuses_a_wrong_word_with_the_list_of_right_ones():
    seen, unchecked = [], []
    for called, function in _public_functions().items():
        for name, hint in _hints(function).items():
            if not (words := _choices(hint)):
                continue
            taken = getattr(function, "taken", None)
            if called == "tstlens.model.HookedTST.forward":
                continue  # runs in every loop; tests/model/test_requests.py
            if taken is None:
                unchecked.append(f"{called}({name}=)")
                continue
            with pytest.raises(ArgumentError) as refused:
                taken(name, "nonsense")
            assert all(repr(word) in str(refused.value) for word in words), called
            assert f"expected {name} as" in str(refused.value)
            seen.append(called)
    assert not unchecked, "decorate with @checked"
    assert {"tstlens.patching.sweep", "tstlens.patching.ComponentGraph.sender_at"} <= {*seen}
    assert len(seen) > 30


def test_a_node_of_no_kind_is_refused():
    graph = patching.ComponentGraph(n_layers=1, n_heads=2)
    with pytest.raises(ArgumentError, match="'head', 'mlp' or 'output', got 'haed'; .* 'head'?"):
        graph.sender_at("haed", 0)


def test_what_fits_is_let_through(model):
    assert everything(model, SERIES, torch.ones(2, 4).bool(), 1, ["a"], "b") == "ran"
    assert everything(n=np.int64(3), level=np.float32(0.5), strengths=(1, 2.5)) == "ran"
    assert everything(path=Path("x"), options={}, metric=len, unknown=object()) == "ran"
    assert everything.__name__ == "everything" and everything.__doc__


@checked
def taken(
    n: Count = 1,
    level: Share = 0.5,
    on: bool = True,
    names: Sequence[str] = (),
    strengths: Sequence[float] = (),
    cells: Sequence[tuple[int, int]] = (),
    limits: tuple[float, float] | None = None,
    arrays: Sequence[Any] = (),
    *rest: Any,
    flag: bool = False,
) -> Any:
    """What reaches a function."""
    return locals()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("n", np.int64(3), 3),
        ("n", torch.tensor(3), 3),
        ("level", np.float32(0.25), 0.25),
        ("on", np.bool_(False), False),
        ("names", {"a": 1, "b": 2}.keys(), ["a", "b"]),
        ("names", (name for name in "ab"), ["a", "b"]),
        ("names", np.array(["a", "b"]), ["a", "b"]),
        ("strengths", np.linspace(0, 1, 3), [0.0, 0.5, 1.0]),
        ("strengths", torch.tensor([0.5, 1.0]), [0.5, 1.0]),
        ("strengths", pd.Series([0.5, 1.0]), [0.5, 1.0]),
        ("strengths", range(2), range(2)),
        ("cells", [[0, 4], [4, 8]], [(0, 4), (4, 8)]),
        ("cells", np.array([[0, 4], [4, 8]]), [(0, 4), (4, 8)]),
        ("limits", [-1, 1], (-1, 1)),
    ],
)
def test_what_says_the_same_without_a_loss_is_taken_as_what_it_says(name, given, expected):
    found = taken(**{name: given})[name]
    assert found == expected and type(found) is type(expected)


def test_an_array_of_series_is_a_sequence_of_arrays():
    found = taken(arrays=np.arange(6).reshape(3, 2))["arrays"]
    assert [row.tolist() for row in found] == [[0, 1], [2, 3], [4, 5]]
    sites = patching.Site("z", head=np.array([0, 1]), pos=np.int64(2))
    assert sites.head == [0, 1] and type(sites.pos) is int


def test_more_arguments_without_a_name_are_no_parameter(model, data):
    found = taken(1, 0.5, True, (), (), (), None, (), "more", None)
    assert found["rest"] == ("more", None) and found["flag"] is False
    with pytest.raises(ArgumentError, match="flag as True or False, got 2"):
        taken(flag=2)
    expected = model(data.series, "logits")
    assert torch.equal(model.run_with_codebooks(data.series, "logits"), expected)
    logits, loss = model.run_with_saes(data.series, "both", target=data.labels)
    assert torch.equal(logits, expected) and loss.ndim == 0


def test_python_says_itself_what_is_no_parameter():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sead'"):
        everything(sead=1)


def test_values_are_shown_short():
    assert shown(torch.zeros(2, 3)) == "Tensor float32 [2, 3]"
    assert shown(None) == "None" and shown("x") == "'x'" and shown([0] * 99) == "a list"
    assert shown(nn.Linear(1, 1)) == "a Linear" and shown(everything) == "everything"


def test_slices_are_not_cut_to_what_there_is():
    for fits in (slice(None), slice(2, 5), slice(-3, None), slice(None, None, 2)):
        check_slice(fits, 5, "pos")
    with pytest.raises(ArgumentError, match=r"expected pos within 0\.\.5, got slice\(2, 6, None\)"):
        check_slice(slice(2, 6), 5, "pos")
    with pytest.raises(ArgumentError, match=r"selects nothing of 0\.\.4"):
        check_slice(slice(3, 3), 5, "pos")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"expected metric to give one value per series \[2\], got None"),
        (torch.ones(2, 3), r"got \[2, 3\]"),
        (torch.tensor(1.0), r"got \[\]"),
        (torch.tensor([1.0, float("nan")]), "finite values, got nan for series 1"),
        ([0.0, float("-inf")], "finite values, got -inf for series 1"),
    ],
)
def test_numbers_that_cannot_be_ranked_by(values, message):
    with pytest.raises(ArgumentError, match=message):
        one_per_row(values, torch.zeros(2, 3), "metric")


def test_counts_and_hits_become_numbers():
    hits = one_per_row(torch.tensor([True, False]), torch.zeros(2, 3), "metric")
    assert torch.equal(hits, torch.tensor([1.0, 0.0]))


def test_analyses_refuse_what_would_be_guessed_or_spread(model, data):
    a, b, labels = data.series[:4], data.series[4:8], data.labels[:4]
    given, quiet = (model, a, b, "z", ("layer", "head")), {"progress": False}
    metric = patching.log_prob(labels)
    pairs = Pairs(a, b, labels)
    result = patching.sweep(*given, metric, **quiet)
    cases = [
        (lambda: patching.sweep(*given, lambda out: out.mean(), **quiet), "one value per series"),
        (lambda: patching.sweep(*given, lambda out: out[:, 0] / 0, **quiet), "finite values"),
        (lambda: patching.sweep(*given, metric, "mean", reference=a[:0], **quiet), "one reference"),
        (
            lambda: patching.sweep(
                model, a, b, patching.Site("attn_out", pos=slice(5, 99)), ("layer",), metric
            ),
            "pos within 0..10",
        ),
        (lambda: patching.Site("z", layer="0"), r"Site\.layer as an integer or None, got '0'"),
        (lambda: patching.patch(model, a, b, []), "at least one site"),
        (
            lambda: patching.run_campaign(
                model,
                pairs,
                "never-made",
                grids=[("z", ("layer", "head"))],
                metrics={"own": lambda pairs: lambda out: out[:, 0]},
            ),
            "metric 'own' to be a function from pairs to a metric",
        ),
        (lambda: probing.Direction("hook_embed", a / 0, "by hand", "ones"), "finite numbers"),
        (lambda: patching.mse(a, horizon=slice(0, 99)), "horizon within 0..10"),
        (lambda: patching.mse(a / 0), "finite reference"),
        (lambda: patching.edge_sweep(model, a, b, metric, edges=[], **quiet), "at least one edge"),
        (lambda: patching.alike_pairs(model, data[:0]), "series to pair, got none"),
        (lambda: patching.alike_pairs(lambda x: 1.0, data), "logits .* from the model.* got 1.0"),
        (
            lambda: patching.null_map(model, pairs, "z", ("layer",), metric, **quiet),
            "function from targets to a metric",
        ),
        (lambda: patching.summary(result, a.numpy()), r"per pair \[4\], got ndarray"),
        (lambda: patching.faithfulness(result, model, pairs), "as a Circuit, got a SweepResult"),
        (lambda: result.top(0), "n as an integer of at least 1, got 0"),
        (
            lambda: probing.skip_cost(
                model, TimeSeriesData(data.series, torch.arange(12)), **quiet
            ),
            r"labels in 0\.\.2, got 3",
        ),
        (lambda: probing.skip_cost(model, data, metric=lambda out: out, **quiet), "one value per"),
        (
            lambda: probing.activations(model, data, "z")["blocks.0.attn.hook_z"].head(2),
            "head in 0..1, got 2",
        ),
        (
            lambda: patching.over_pairs(result, n_resamples=0),
            "as an integer of at least 100",
        ),
        (lambda: figures.series(a[0], mask=torch.ones(1).bool()), r"a mask \[time=10\], got \[1\]"),
        (lambda: figures.series(a[0], highlight=[7]), r"highlight in 0\.\.1, got 7"),
        (lambda: figures.pair(pairs, 2, class_names=["only one"]), "a name for class 2 too"),
        (lambda: figures.draw(result, limits=-1.0), "limits as a positive number"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_a_push_at_no_position_is_refused(model, data):
    way = probing.Direction("hook_embed", torch.ones(8), "by hand", "ones")
    for pos in (slice(50, 60), []):
        with pytest.raises(ArgumentError, match=r"pos.* 0\.\."):
            probing.dose_response(model, data, way, target=0, pos=pos, n_random=1, progress=False)


def test_functions_of_transformer_lens_name_what_does_not_fit(model, data):
    clean, corrupted = data.series[:4], data.series[4:8]
    cache = model.run_with_cache(clean)[1]
    call = patching.get_act_patch_resid_pre
    with pytest.raises(InputError, match="of one series or as many as the corrupted ones"):
        call(model, corrupted[:2], cache, lambda out: out.mean())
    with pytest.raises(ArgumentError, match=r"one finite number .* got Tensor float32 \[4\]"):
        call(model, corrupted, cache, lambda out: out[:, 0])
    with pytest.raises(ArgumentError, match="index_df as a pandas DataFrame, got 3"):
        call(model, corrupted, cache, lambda out: out.mean(), index_df=3)


@dataclass(frozen=True)
class Options:
    width: Count = 4
    kind: Literal["soft", "hard"] = "soft"
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


@checked
@configured(Options)
def fitted(data: Sequence[int], config: Options | None = None, *, bar: bool = True, **settings):
    """What arrives: the data, the config, and nothing else."""
    assert not settings
    return list(data), config, bar


@pytest.mark.parametrize("config", [None, Options(), Options(7, "hard", 3)])
@pytest.mark.parametrize("settings", [{}, {"width": 9}, {"seed": 2, "kind": "hard"}])
@pytest.mark.parametrize("positional", [False, True])
def test_fields_of_a_config_are_keywords_too(config, settings, positional):
    given = ([1], config) if positional else ([1],)
    named = {} if positional else {"config": config}
    expected = replace(config or Options(), **settings)
    assert fitted(*given, bar=False, **named, **settings) == ([1], expected, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"widht": 3}, "fitted has no option 'widht'; did you mean 'width'. it has width, kind"),
        ({"baz": 3}, "fitted has no option 'baz'; did you mean 'bar'"),
        ({"width": 0}, "expected width as an integer of at least 1, got 0"),
        ({"kind": "sofd"}, "expected kind as 'soft' or 'hard', got 'sofd'; did you mean 'soft'"),
        ({"config": 3}, "config as an Options or None, got 3"),
        ({"config": {"width": 3}}, "config as an Options or None, got"),
        ({"bar": "no"}, "bar as True or False"),
    ],
)
def test_what_is_no_field_is_refused_with_the_one_that_is_meant(given, message):
    with pytest.raises(ArgumentError, match=message):
        fitted([1], **given)


def test_a_signature_shows_the_fields():
    parameters = inspect.signature(fitted).parameters
    assert list(parameters) == ["data", "config", "bar", "width", "kind", "seed"]
    assert parameters["width"].default == 4
    assert pickle.loads(pickle.dumps(fitted)) is fitted


@dataclass(frozen=True)
class Inherited(Options):
    sizes: Sequence[int] = field(default_factory=lambda: (1, 2))


@checked
@configured(Inherited)
def fitted_with_more(config: Inherited | None = None, **settings):
    """A config whose fields are partly its parent's, one of them without a plain default."""
    return config


def test_inherited_fields_and_defaults_that_are_made_are_settings_like_others():
    assert inspect.signature(fitted_with_more).parameters["sizes"].default == (1, 2)
    assert fitted_with_more(width=7, sizes=np.arange(2)) == Inherited(width=7, sizes=[0, 1])
    with pytest.raises(ArgumentError, match="expected width as an integer"):
        fitted_with_more(width=0)
    with pytest.raises(ArgumentError, match=r"Inherited.width as an integer"):
        Inherited(width=0)


def test_every_public_function_with_a_config_takes_its_fields_as_keywords():
    """None hands ``**settings`` on by itself, to end in Python's own words for a wrong one."""
    found = 0
    for name, function in _public_functions().items():
        parameters = inspect.signature(function).parameters
        found += "config" in parameters
        raw = [one for one in parameters.values() if one.kind is one.VAR_KEYWORD]
        assert "settings" not in [one.name for one in raw], name
    assert found >= 7
