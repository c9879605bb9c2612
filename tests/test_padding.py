"""What stands in padding changes no number, in any analysis.

Every public function is called twice with the same series and masks, once with zeros in the
padding and once with 9,000. A public function without a row in the table fails the last test.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.conftest import NO_SAES
from tstlens import data as data_room
from tstlens import patching, probing, report
from tstlens.data import Pairs, TimeSeriesData
from tstlens.errors import SeriesShapeError
from tstlens.model import (
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    PerStepConfig,
)
from tstlens.patching import Site

TRUNK = {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_mlp": 12, "n_channels": 2, "n_time": 8}
FILLS = (0.0, 9e3)
QUIET = {"progress": False}
HOOK = "blocks.0.hook_mlp_out"


def random_model(embed: Any = None, **options: Any) -> HookedTST:
    cfg = HookedTSTConfig(
        **TRUNK,
        embed=embed or PerStepConfig(),
        head=HeadConfig("mean", n_classes=3),
        positions="learned",
        **options,
    )
    model = HookedTST(cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
        data = some_data(0.0)
        model.head.b_U.sub_(model(data.series, mask=data.mask).mean(0))  # all classes are predicted
    return model


def some_data(fill: float, n: int = 18, seed: int = 0, name: str = "toy") -> TimeSeriesData:
    """Three classes of sines of 3 to 8 samples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    series = torch.randn(n, 2, 8, generator=generator) + labels[:, None, None]
    mask = torch.arange(8) < (3 + torch.arange(n) // 3 % 6)[:, None]
    series = torch.where(mask[:, None], series, fill)
    # As it is: what the constructor does with padding is for the analyses to know, not this test.
    return TimeSeriesData(series, labels, ("a", "b", "c"), mask=mask, name=name, split="test")


class World(SimpleNamespace):
    """A model, and series with one fill."""

    @classmethod
    def of(cls, fill: float, tmp_path: Path, model: HookedTST | None = None) -> World:
        made = some_data(fill)
        rows, others = torch.tensor([0, 3, 9]), torch.tensor([10, 1, 5])
        raw = torch.where(made.mask[:, None], made.series, torch.tensor(fill))
        return cls(
            model=model or random_model(),
            data=made,
            more=some_data(fill, seed=1),
            fill=fill,
            raw=raw,
            clean=raw[rows],
            corrupted=raw[others],
            masks={"clean_mask": made.mask[rows], "corrupted_mask": made.mask[others]},
            metric=patching.logit(torch.tensor([0, 2, 1])),
            labels=made.labels,
            tmp=tmp_path / str(fill),
            seed=0,
        )

    @property
    def args(self) -> tuple[Any, ...]:
        return self.model, self.clean, self.corrupted

    @property
    def pairs(self) -> Pairs:
        target = torch.tensor([0, 2, 1])
        return Pairs(self.clean, self.corrupted, target, *self.masks.values())

    @property
    def right(self) -> TimeSeriesData:
        """Labelled as the model sees it."""
        seen = self.model(self.data.series, mask=self.data.mask).argmax(1)
        return dataclasses.replace(self.data, labels=seen)

    @property
    def alike(self) -> dict[str, Any]:
        """One pair of the same mask throughout, which the circuits need."""
        mask = self.data.mask[torch.tensor([0, 3, 9])]
        corrupted = torch.where(mask[:, None], self.raw[torch.tensor([15, 16, 17])], self.fill)
        return {"clean": self.clean, "corrupted": corrupted, "mask": mask}

    @property
    def even(self) -> Pairs:
        alike = self.alike
        target = torch.tensor([0, 2, 1])
        return Pairs(alike["clean"], alike["corrupted"], target, alike["mask"], alike["mask"])

    @property
    def edges(self) -> dict[str, Any]:
        alike = self.alike
        return {
            "clean": alike["clean"],
            "corrupted": alike["corrupted"],
            "clean_mask": alike["mask"],
            "corrupted_mask": alike["mask"],
            "metric": self.metric,
            **QUIET,
        }

    @property
    def sae(self) -> Any:
        from tests.saes.hand_made import random_dictionary

        return random_dictionary(8, 6, HOOK, seed=1)

    @property
    def trained(self) -> Any:
        from tstlens import saes

        options = {"d_sae": 6, "k": 2, "steps": 3, "batch_size": 8}
        return saes.train(self.model, self.raw, HOOK, mask=self.data.mask, **options, **QUIET)

    @property
    def booked(self) -> HookedTST:
        from tstlens import codebooks

        model, options = random_model(), {"n_codes": 6, "epochs": 1, "batch_size": 6}
        codebooks.fit(model, self.data, [HOOK], train_model=True, **options, **QUIET)
        return model


def circuit_of(w: World) -> Any:
    return patching.Circuit.from_edge_attribution(
        w.model, w.even, top_k=6, steps=1, channels=True, **QUIET
    )


def attributed(w: World, **options: Any) -> Any:
    given = {"method": "integrated_gradients", "baseline": "mean", "n_steps": 2, **QUIET}
    mask = w.data.mask[:4]
    return probing.attribute(w.model, w.raw[:4], w.labels[:4], mask=mask, **given | options)


def campaign(w: World) -> Any:
    grids = [("series", ("channel", "time")), ("z", ("layer", "head", "pos"))]
    return patching.run_campaign(w.model, w.pairs, w.tmp, grids=grids, figures=False, **QUIET)


def made_report(w: World) -> Any:
    out = report.build(w.model, w.tmp / "report.html", data=w.data, max_pairs=3, **QUIET)
    timed = re.compile(r"seconds|of_exact")  # the latter a ratio of times

    def untimed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if not timed.search(key)}

    numbers = json.loads(out.with_suffix(".json").read_text(), object_pairs_hook=untimed)
    assert numbers.pop("made")["seed"] == 0  # the rest of it is when and how fast
    return numbers


SWEEPS = {
    f"sweep {site} by {'x'.join(axes)}, {source}": lambda w, s=site, a=axes, o=source: (
        patching.sweep(
            *w.args,
            s,
            a,
            w.metric,
            source=w.alike["corrupted"] if o == "series" else o,
            reference=w.raw,
            reference_mask=w.data.mask,
            **w.masks,
            **QUIET,
        )
    )
    for site, axes in [
        ("series", ("time",)),
        ("series", ("channel", "time")),
        ("series", ("channel",)),
        ("embed", ("pos",)),
        ("resid_pre", ("layer", "pos")),
        ("v", ("layer", "head", "pos")),
        ("z", ("layer", "head")),
        ("mlp_out", ("layer",)),
        ("pattern", ("layer", "head", "query")),
        ("pattern", ("layer", "key")),
        ("attn_scores", ("layer", "head")),
        ("pooled", ()),
    ]
    for source in ("clean", "zero", "mean", "series")
    if (site, source) != ("attn_scores", "mean")  # -inf has no mean
}

PATCHING: dict[str, Callable[[World], Any]] = {
    **SWEEPS,
    **{
        f"attribution {site}, {source}, {steps} steps {path}": (
            lambda w, s=site, o=source, n=steps, p=path: patching.attribution(
                *w.args,
                s,
                ("time",) if s == "series" else ("layer",),
                w.metric,
                n,
                "clean" if o == "clean" else o,
                path=p,
                qk_correction=s == "k",
                reference=w.raw,
                reference_mask=w.data.mask,
                **w.masks,
                **QUIET,
            )
        )
        for site in ("series", "z", "k", "pattern")
        for source in ("clean", "zero", "mean")
        for steps, path in ((0, "site"), (2, "site"), (2, "input"))
        if path == "site" or source == "clean"
    },
    **{
        f"ablate {site}, {source}": lambda w, s=site, o=source: patching.ablate(
            w.model,
            w.raw,
            s,
            ("time",) if s == "series" else ("layer",),
            o,
            metric=patching.logit(w.labels),
            mask=w.data.mask,
            reference=w.raw,
            reference_mask=w.data.mask,
            **QUIET,
        )
        for site in ("series", "z", "mlp_out", "block", "pattern")
        for source in ("zero", "mean", "resample")
    },
    "patch": lambda w: [
        patching.patch(
            *w.args,
            [Site(name, layer), Site("series", time=[1, 5])],
            source,
            reference=w.raw,
            reference_mask=w.data.mask,
            **w.masks,
        )
        for name, layer in (("resid_pre", 1), ("z", 0), ("series", None))
        for source in ("clean", "zero", "mean", w.alike["corrupted"])
    ],
    "window_sweep": lambda w: patching.window_sweep(*w.args, w.metric, **w.masks, **QUIET),
    "head_influence": lambda w: patching.head_influence(*w.args, **w.masks, **QUIET),
    "edge_sweep": lambda w: patching.edge_sweep(w.model, channels=True, **w.edges),
    "edge_attribution": lambda w: [
        patching.edge_attribution(w.model, channels=True, steps=2, along=along, **w.edges)
        for along in ("inputs", "edges")
    ],
    "path_patch": lambda w: patching.path_patch(w.model, receivers="L1H0.k", **w.edges),
    "follow_paths": lambda w: patching.follow_paths(
        w.model, paths=["pos1->L0H1.v->output", "L0H0->output"], **w.edges
    ),
    "faithfulness": lambda w: patching.faithfulness(
        circuit_of(w), w.model, w.even, fractions=(0.1, 1.0), **QUIET
    ),
    "Circuit": lambda w: [
        circuit_of(w).patch_together(w.model, w.even, **QUIET),
        circuit_of(w).minimality(w.model, w.even, **QUIET),
    ],
    "attention": lambda w: [
        patching.attention(w.model, w.raw, w.data.mask, average=mean) for mean in (True, False)
    ],
    "lens": lambda w: [
        patching.lens(w.model, w.raw, w.labels, mask=w.data.mask, by_pos=by_pos)
        for by_pos in (True, False)
    ],
    "logit_attribution": lambda w: patching.logit_attribution(
        w.model, w.raw, w.labels, mask=w.data.mask, **QUIET
    ),
    "alike_pairs": lambda w: [
        patching.alike_pairs(w.model, w.right, equal_lengths=equal) for equal in (False, True)
    ],
    "null_map": lambda w: patching.null_map(w.model, w.pairs, "series", ("time",), **QUIET),
    "run_campaign": campaign,
    "figures": lambda w: [
        patching.sweep(*w.args, "series", ("time",), w.metric, **w.masks, **QUIET).figure(),
        patching.attention(w.model, w.raw, w.data.mask).figure(),
        attributed(w).figure(index=1),
        __import__("tstlens").figures.pair(w.pairs, 1),
    ],
}

PROBING: dict[str, Callable[[World], Any]] = {
    "activations": lambda w: {
        name: part.values[part.observed]
        for name, part in probing.activations(w.model, w.data, [HOOK]).items()
    },
    "attribute": lambda w: [
        attributed(
            w,
            method=method,
            unit=unit,
            n_samples=3,
            baseline=baseline,
            background=w.more if baseline == "mean" else None,
        )
        for method in (
            "integrated_gradients",
            "gradient_shap",
            "occlusion",
            "shapley_sampling",
            "kernel_shap",
            "permutation_shap",
        )
        for unit, baseline in (("time", "mean"), ("patch", "zero"))
    ],
    "deletion_insertion": lambda w: probing.deletion_insertion(
        w.model,
        w.raw[:4],
        w.labels[:4],
        attributed(w),
        mask=w.data.mask[:4],
        n_points=3,
        n_random=2,
        n_boot=100,
        **QUIET,
    ),
    "prediction_difference": lambda w: probing.prediction_difference(
        w.model,
        w.raw[:4],
        w.labels[:4],
        attributed(w),
        mask=w.data.mask[:4],
        n_top=2,
        replacement=w.raw[4:8],
    ),
    "direction": lambda w: [
        probing.direction(
            w.model,
            w.raw[:6],
            w.raw[6:12],
            hook=HOOK,
            method=method,
            a_mask=w.data.mask[:6],
            b_mask=w.data.mask[6:12],
        )
        for method in ("mean", "lda")
    ],
    "dose_response": lambda w: probing.dose_response(
        w.model, w.raw, PROBING["direction"](w)[0], target=1, mask=w.data.mask, n_random=2, **QUIET
    ),
    "random_directions": lambda w: probing.random_directions(PROBING["direction"](w)[0], 2),
    "separability": lambda w: probing.separability(
        w.model,
        w.raw[:9],
        w.raw[9:],
        HOOK,
        a_mask=w.data.mask[:9],
        b_mask=w.data.mask[9:],
        n_splits=2,
        n_permutations=4,
        **QUIET,
    ),
    "probe": lambda w: probing.probe(w.model, w.data, w.more, hooks=HOOK, n_folds=2, **QUIET),
    "clusters": lambda w: probing.clusters(
        w.model, w.data, HOOK, n_clusters=2, n_permutations=100, **QUIET
    ),
    "cluster_effect": lambda w: probing.cluster_effect(
        w.model,
        w.trained,
        w.data,
        probing.clusters(
            w.model,
            w.data,
            sae=w.trained,
            what="latents",
            n_clusters=2,
            n_permutations=100,
            **QUIET,
        ),
        n_draws=2,
        **QUIET,
    ),
    "similarity": lambda w: probing.similarity(w.model, None, w.data, HOOK, n_shuffles=1, **QUIET),
    **{
        f"match_units {rows}": lambda w, rows=rows: probing.match_units(
            w.model, random_model(norm_position="post"), w.data, HOOK, rows=rows, **QUIET
        )
        for rows in ("positions", "series")
    },
    "skip_cost": lambda w: probing.skip_cost(w.model, w.data, **QUIET),
    "surrogate": lambda w: probing.surrogate(w.model, w.data, 1, n_boot=100, n_splits=2),
    "units": lambda w: probing.units(w.model, w.data, HOOK, seeds=(0,), **QUIET),
}


def saes_rows() -> dict[str, Callable[[World], Any]]:
    from tstlens import saes

    return {
        "train": lambda w: w.trained.state_dict(),
        "score": lambda w: saes.score(w.model, w.trained, w.data),
        "latents": lambda w: vars(saes.latents(w.model, w.trained, w.data)),
        "features": lambda w: saes.features(
            w.model, w.sae, w.data, n_permutations=100, effect_series=2, **QUIET
        ),
        "ablate_latent": lambda w: saes.ablate_latent(w.model, w.sae, w.data, 1, n_controls=2),
        "steer_latent": lambda w: saes.steer_latent(w.model, w.sae, w.data, 1, n_controls=2),
        "feature_graph": lambda w: [
            saes.feature_graph(
                w.model,
                [w.sae],
                w.raw,
                patching.logit(w.labels),
                mask=w.data.mask,
                baseline=baseline,
                n_latents=3,
                n_edges=3,
                n_exact=2,
                n_controls=1,
                **QUIET,
            )
            for baseline in ("zero", "mean", w.raw.flip(1))
        ],
        "compare": lambda w: saes.compare(
            w.sae, w.sae, model=w.model, data=w.data, by="activations"
        ),
        "browse": lambda w: page_of(
            saes.browse(
                w.model, w.sae, w.data, w.tmp / "p.html", n_windows=2, n_permutations=100, **QUIET
            )
        ),
        "random_dictionary": lambda w: [
            make(w.trained, probed(w), k=2).state_dict()
            for make in (saes.random_dictionary, saes.neuron_dictionary)
        ],
    }


def probed(w: World) -> Tensor:
    return torch.from_numpy(probing.activations(w.model, w.data, [HOOK])[HOOK].rows()[0])


def page_of(path: Path) -> str:
    return path.read_text()


def codebook_rows() -> dict[str, Callable[[World], Any]]:
    from tstlens import codebooks
    from tstlens.codebooks import CodebookConfig, CodeIndex

    def index(w: World) -> CodeIndex:
        return CodeIndex.build(w.booked, w.data, **QUIET)

    return {
        "start": lambda w: {
            how: codebooks.start(
                w.model, w.data, [HOOK], CodebookConfig(d_in=8, n_codes=6), how=how
            )[HOOK].state_dict()
            for how in ("kmeans", "sample")
        },
        "fit": lambda w: [p.detach() for p in w.booked.parameters()],
        "score": lambda w: codebooks.score(w.booked, w.data, train=w.more, sae_steps=2),
        "effects": lambda w: codebooks.effects(
            w.booked, w.data, {HOOK: 1}, n_controls=2, label=1, reference=w.more
        ),
        "index": lambda w: [
            index(w).search(label="a", n_permutations=100, min_support=1),
            index(w).search(lambda window: window.level > 0, n_permutations=100, min_support=1),
            index(w).to_dataframe(),
            index(w).changes(0, 1),
        ],
        "browse": lambda w: page_of(
            codebooks.browse(w.booked, w.data, w.tmp / "c.html", n_windows=2, **QUIET)
        ),
    }


DATA: dict[str, Callable[[World], Any]] = {
    "corrupt_with_mean": lambda w: data_room.corrupt_with_mean(
        w.raw[:6], 0, time=slice(0, 6), mask=w.data.mask[:6]
    ),
    "corrupt_with_noise": lambda w: data_room.corrupt_with_noise(
        w.raw[:6], 0, time=slice(0, 6), mask=w.data.mask[:6]
    ),
    "corrupt_with_sample": lambda w: [
        data_room.corrupt_with_sample(w.raw, w.data[torch.full((18,), 15)], 0, mask=w.data.mask),
        data_room.corrupt_with_sample(w.data, w.data[torch.full((18,), 15)]),
    ],
    "corrupt_with_shift": lambda w: data_room.corrupt_with_shift(w.raw, 2, 0, mask=w.data.mask),
    "class_pairs": lambda w: [
        data_room.class_pairs(w.data, "a", "b", 4, equal_lengths=equal) for equal in (False, True)
    ],
    "misclassified_pairs": lambda w: data_room.misclassified_pairs(w.model, w.data),
    "Pairs": lambda w: [w.pairs, w.pairs.swap()],
}

REPORT: dict[str, Callable[[World], Any]] = {"build": made_report}

NO_SERIES = {  # public functions that take no series of the user's, by room
    patching: (
        "agreement campaign_grids component_graph load_campaign log_prob logit logit_diff prob mse "
        "quantile_loss crps forecast mae mase make_df_from_ranges over_pairs site_names "
        "split_half summary "
        # TransformerLens' own signatures, which know no mask
        "generic_activation_patch get_act_patch_.*"
    ),
    probing: "cka latent_direction",
    report: "forecast_card model_card make_checkpoint make_forecast_checkpoint truth",
    data_room: (
        "check_series load_.* planted planted_names recorded_series score_features score_states "
        "score_where"
    ),
}
NO_SERIES_SAES = (
    "architectures fit from_linear history list_saes load neuron_dictionary recovery save "
    "training_config"
)
NO_SERIES_CODEBOOKS = "ban_nearest fit_regime load make_codebooks regime_.* score_regime"


def numbers_of(value: Any, depth: int = 0) -> list[Any]:
    """Every number and text of a result, in order."""
    if value is None or isinstance(value, str | bool | int | float):
        return [value]
    if isinstance(value, Tensor):
        return [value.detach().double().numpy()] if not value.is_complex() else []
    if isinstance(value, np.ndarray):
        return [value.astype(float)] if value.dtype.kind in "fiub" else [str(value.tolist())]
    if isinstance(value, pd.DataFrame):
        return numbers_of({column: value[column].to_numpy() for column in value}, depth)
    if isinstance(value, Mapping):
        return [x for key in value for x in numbers_of(value[key], depth)]
    if isinstance(value, list | tuple):
        return [x for entry in value for x in numbers_of(entry, depth)]
    if hasattr(value, "to_plotly_json"):
        return numbers_of(value.to_plotly_json(), depth)
    if dataclasses.is_dataclass(value) and depth < 6:
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return [x for entry in fields for x in numbers_of(entry, depth + 1)]
    return []


def assert_same(one: Any, other: Any) -> None:
    first, second = numbers_of(one), numbers_of(other)
    assert len(first) == len(second)
    assert any(isinstance(x, np.ndarray | str) for x in first), "nothing to compare"
    for a, b in zip(first, second, strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6)
        elif not isinstance(a, str) or not a.startswith("/"):
            assert a == b or (a != a and b != b) or abs(a - b) < 1e-6


ROWS = {
    f"{room}.{name}": row
    for room, rows in (
        ("patching", PATCHING),
        ("probing", PROBING),
        ("data", DATA),
        ("report", REPORT),
        *(() if NO_SAES else (("saes", saes_rows()), ("codebooks", codebook_rows()))),
    )
    for name, row in rows.items()
}


@pytest.mark.parametrize("name", ROWS)
def test_what_stands_in_padding_changes_no_number(name, tmp_path):
    if name == "probing.cluster_effect" and NO_SAES:
        pytest.skip(NO_SAES)
    results = []
    for fill in FILLS:
        torch.manual_seed(0)
        results.append(ROWS[name](World.of(fill, tmp_path)))
    assert_same(*results)


@pytest.mark.parametrize(
    "name", [*SWEEPS, "patch", "run_campaign", "attribution k, clean, 0 steps site"]
)
def test_nor_where_positions_are_patches_of_each_channel(name, tmp_path):
    results = []
    for fill in FILLS:
        embed = LinearPatchesConfig(2, 2, channel_independent=True)
        model = random_model(embed)
        results.append(PATCHING[name](World.of(fill, tmp_path, model)))
    assert_same(*results)


def both_observed(w: World) -> Tensor:
    clean, corrupted = w.masks.values()
    return clean & corrupted


@pytest.mark.parametrize("site", ["resid_pre", "z", "mlp_out", "v"])
def test_only_positions_of_both_series_are_replaced(site, tmp_path):
    """Against a serial loop; where either series ends, the effect is 0."""
    w = World.of(9e3, tmp_path)
    found = patching.sweep(*w.args, site, ("layer", "pos"), w.metric, **w.masks, **QUIET)
    names = [patching.sites.locate(w.model, Site(site)).hook_name(layer) for layer in (0, 1)]
    clean = w.model.run_with_cache(w.clean, mask=w.masks["clean_mask"])[1]
    for layer, name in enumerate(names):
        for pos in range(8):
            at = both_observed(w)[:, pos]

            def put(act, hook, at=at, pos=pos, name=name):
                act = act.clone()
                act[at, pos] = clean[name][at, pos]
                return act

            output = w.model.run_with_hooks(
                w.corrupted, mask=w.masks["corrupted_mask"], fwd_hooks=[(name, put)]
            )
            expected = w.metric(output[None])[0].detach()
            torch.testing.assert_close(found.values[:, layer, pos], expected, atol=1e-5, rtol=1e-5)
    gone = ~both_observed(w)
    assert gone.any() and found.effect().transpose(1, 2)[gone].abs().max() < 1e-6
    assert found.effect().transpose(1, 2)[~gone].abs().min() > 1e-6


def test_samples_that_one_series_lacks_are_not_patched(tmp_path):
    w = World.of(9.0, tmp_path)
    found = patching.sweep(*w.args, "series", ("time",), w.metric, **w.masks, **QUIET)
    mixed = torch.where(both_observed(w)[:, None], w.clean, w.corrupted)
    whole = patching.patch(*w.args, Site("series"), **w.masks)
    expected = w.model(mixed, mask=w.masks["corrupted_mask"])
    torch.testing.assert_close(whole, expected.detach(), atol=1e-5, rtol=1e-5)
    assert found.effect()[~both_observed(w)].abs().max() < 1e-6
    estimated = patching.attribution(*w.args, "series", ("time",), w.metric, **w.masks, **QUIET)
    assert (estimated.effect()[~both_observed(w)] == 0).all()


def test_a_mean_is_needed_only_where_a_studied_series_reaches(tmp_path):
    w = World.of(0.0, tmp_path)
    short, options = w.data[:6], {"metric": patching.logit(w.labels[:6]), **QUIET}
    means = {"reference": w.raw[:6], "reference_mask": short.mask}
    for site, axes in (("mlp_out", ("layer", "pos")), ("series", ("time",))):
        found = patching.ablate(
            w.model, w.raw[:6], site, axes, "mean", mask=short.mask, **means, **options
        )
        effect = found.effect() if site == "series" else found.effect().transpose(1, 2)
        assert effect[~short.mask].abs().max() < 1e-6 < effect[short.mask].abs().max()
        longer = {**options, "metric": patching.logit(w.labels)}
        with pytest.raises(SeriesShapeError, match="is padding in every reference series"):
            patching.ablate(w.model, w.raw, site, axes, "mean", mask=w.data.mask, **means, **longer)
        both = {"reference": w.raw, "reference_mask": w.data.mask}
        swept = patching.sweep(
            w.model,
            w.raw,
            w.raw,
            site,
            axes,
            longer["metric"],
            source="mean",
            clean_mask=w.data.mask,
            corrupted_mask=w.data.mask,
            **both,
            **QUIET,
        )
        ablated = patching.ablate(
            w.model, w.raw, site, axes, "mean", mask=w.data.mask, **both, **longer
        )
        torch.testing.assert_close(swept.values, ablated.values, atol=1e-5, rtol=1e-5)


def takes_missing() -> tuple[HookedTST, Tensor, Tensor]:
    from tstlens.zoo.patchtst import PatchTSTEmbedConfig

    model = random_model(PatchTSTEmbedConfig(2, 2))
    series = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(7))
    missing = series.clone()
    missing[2, 0, 3] = torch.nan
    return model, series, missing


def test_one_missing_sample_leaves_means_and_patches_alone():
    model, series, missing = takes_missing()
    target, others = torch.zeros(5, dtype=torch.long), [0, 1, 3, 4]
    mean = missing.nanmean(0)
    for site in ("sweep", "ablate"):
        options = {"metric": patching.logit(target), "reference": missing, **QUIET}
        if site == "sweep":
            options["source"], given = "mean", (missing, missing)
        else:
            options["source"], given = "mean", (missing,)
        found = getattr(patching, site)(model, *given, "series", ("channel", "time"), **options)
        mixed = series.clone()
        mixed[:, 0, 3] = mean[0, 3]
        expected = patching.logit(target)(model(mixed)[None])[0].detach()
        torch.testing.assert_close(found.values[others, 0, 3], expected[others])
        assert found.effect()[2, 0, 3].abs() < 1e-6


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion", "shapley_sampling"])
def test_a_patch_with_a_missing_sample_keeps_its_observed_part(method):
    model, _, missing = takes_missing()
    options = {"method": method, "n_steps": 32, "n_samples": 8, **QUIET}
    by_mean = probing.attribute(model, missing, 0, baseline="mean", **options)
    given = probing.attribute(model, missing, 0, baseline=missing.nanmean(0), **options)
    assert not by_mean.values.isnan().any()
    torch.testing.assert_close(by_mean.values, given.values)
    if method == "shapley_sampling":  # complete: shares add up to what the baseline changes
        total = by_mean.values.flatten(1).sum(1)
        gap = by_mean.output - by_mean.baseline_output
        torch.testing.assert_close(total, gap, atol=2e-2, rtol=2e-2)
    assert by_mean.values[2, 0, 1].abs() > 1e-4


@pytest.mark.parametrize("maker", ["class", "misclassified", "alike"])
def test_equal_lengths_pairs_series_of_the_same_samples(maker, tmp_path):
    w = World.of(0.0, tmp_path)
    make = {
        "class": lambda **options: data_room.class_pairs(w.data, "a", "b", 6, **options),
        "misclassified": lambda **options: data_room.misclassified_pairs(
            lambda series, mask: torch.eye(3)[w.fooled], w.data, batch_size=99, **options
        ),
        "alike": lambda **options: patching.alike_pairs(w.model, w.right, **options),
    }[maker]
    w.fooled = torch.where(torch.arange(18) < 9, w.labels, (w.labels + 1) % 3)
    if maker == "misclassified":
        mask = torch.cat([w.data.mask[:9], w.data.mask[:9]])  # the wrong are as long as the right
        w.data = TimeSeriesData(w.raw, w.labels, ("a", "b", "c"), mask=mask)
    equal, free = make(equal_lengths=True), make()
    assert torch.equal(equal.clean_mask, equal.corrupted_mask)
    assert not torch.equal(free.clean_mask, free.corrupted_mask)


ROOMS = [
    (patching, PATCHING, NO_SERIES[patching]),
    (probing, PROBING, NO_SERIES[probing]),
    (report, REPORT, NO_SERIES[report]),
    (data_room, DATA, NO_SERIES[data_room]),
]


def _left_out(room: Any, rows: Mapping[str, Any], excused: str) -> list[str]:
    heads = {name.split(" ")[0] for name in rows}
    return [
        name
        for name in room.__all__
        if inspect.isfunction(getattr(room, name))
        and name not in heads
        and not any(re.fullmatch(pattern, name) for pattern in excused.split())
    ]


def test_every_public_analysis_is_in_the_table():
    rooms = list(ROOMS)
    if not NO_SAES:
        from tstlens import codebooks, saes

        rooms.append((saes, saes_rows(), NO_SERIES_SAES))
        rooms.append((codebooks, codebook_rows(), NO_SERIES_CODEBOOKS))
    left_out = {room.__name__: _left_out(room, rows, excused) for room, rows, excused in rooms}
    assert not any(left_out.values()), f"analyses without a row: {left_out}"
