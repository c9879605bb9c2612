"""Whatever is called leaves the caller's state alone, and gives the same whatever that state is.

One small call of every public function. A new one without a row in ``CALLS`` fails.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor, nn

import tstlens
from tests.conftest import NO_SAES
from tstlens import data, figures, model, patching, probing, report, training, truth, zoo
from tstlens.model import CustomConfig, HeadConfig, HookedTST, HookedTSTConfig, LinearPatchesConfig
from tstlens.truth.components import component_names, component_task
from tstlens.truth.features import planted_features

if NO_SAES is None:
    from tstlens import codebooks, saes
    from tstlens.saes import reading

ROOMS = [
    "tstlens",
    *("tstlens." + name for name in tstlens.__all__ if inspect.ismodule(getattr(tstlens, name, 0))),
    *("tstlens.patching.circuits", "tstlens.saes.reading"),
]
QUIET: dict[str, Any] = {"progress": False}
HOOK = "blocks.0.hook_mlp_out"
POST = "blocks.1.hook_resid_post"


class World:
    """What small calls are made with; whatever a call could change is made anew for it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_folders, self.found = folder, 0, {}

    def of(self, name: str) -> Any:
        """What another row gives, once."""
        if name not in self.found:
            self.found[name] = CALLS[name](self)
        return self.found[name]

    def place(self, name: str = "") -> Path:
        self.n_folders += 1
        folder = self.folder / str(self.n_folders)
        folder.mkdir()
        return folder / name if name else folder

    def fresh(self, **changes: Any) -> HookedTST:
        options: dict[str, Any] = {
            "n_layers": 2,
            "d_model": 8,
            "n_heads": 2,
            "d_mlp": 12,
            "n_channels": 2,
            "n_time": 12,
            "positions": "learned",
            "embed": LinearPatchesConfig(2, 2),
            "head": HeadConfig("mean", n_classes=2),
            "final_norm": True,
            "norm_position": "pre",
            "model_name": "small",
            **changes,
        }
        return HookedTST(HookedTSTConfig(**options))

    @cached_property
    def model(self) -> HookedTST:
        return self.fresh()

    @cached_property
    def data(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(24) % 2
        series = torch.randn(24, 2, 12, generator=generator) + labels[:, None, None]
        return data.TimeSeriesData(series, labels, ("a", "b"), name="toy", split="train")

    @cached_property
    def pairs(self) -> Any:
        return data.class_pairs(self.data, 0, 1, 4)

    @property
    def runs(self) -> tuple[Any, Tensor, Tensor]:
        return self.model, self.pairs.clean, self.pairs.corrupted

    @cached_property
    def metric(self) -> Any:
        return patching.log_prob(self.pairs.target)

    @property
    def act_patch(self) -> Any:
        cache = self.model.run_with_cache(self.pairs.clean)[1]
        return self.model, self.pairs.corrupted, cache, lambda output: output[:, 0].mean()

    @property
    def book_model(self) -> HookedTST:
        changed = self.fresh()
        codebooks.fit(changed, self.data, [HOOK], n_codes=6, epochs=1, **QUIET)
        return changed

    @cached_property
    def machine(self) -> Any:
        return data.RegimeMachine(n_states=12, n_edges=2, n_prototypes=4, patch_len=4, noise=0.1)

    @property
    def next_patch(self) -> HookedTST:
        return HookedTST(
            HookedTSTConfig(
                n_layers=1,
                d_model=8,
                n_heads=2,
                d_mlp=8,
                n_channels=1,
                n_time=24,
                causal=True,
                positions="learned",
                embed=LinearPatchesConfig(4, 4),
                head=CustomConfig("tstlens.truth.training.NextPatchHead"),
            ),
            head=training.NextPatchHead(8, 4),
        )

    @property
    def source(self) -> Any:
        with keeping_state():
            torch.manual_seed(5)
            return training.ConvTST(
                n_channels=2,
                n_time=12,
                n_classes=2,
                conv_channels=(4, 8),
                kernel_sizes=(3, 3),
                strides=(1, 1),
                n_heads=2,
                d_mlp=8,
                n_layers=1,
                dropout=0.2,
            )

    @cached_property
    def recipe(self) -> Any:
        known = training.RECIPES["italy-power-demand"]
        sizes = dataclasses.replace(known.config, n_layers=1, d_mlp=8)
        chosen = {**known.training, "epochs": 1, "batch_size": 64}
        return dataclasses.replace(known, config=sizes, training=chosen)

    @cached_property
    def forecaster_model(self) -> Any:
        return tstlens.HookedTST.from_pretrained("co2")

    @cached_property
    def forecast_recipe(self) -> Any:
        pytest.importorskip("statsmodels")
        return dataclasses.replace(training.FORECAST_RECIPES["co2"], epochs=1, batch_size=512)

    @property
    def forecaster(self) -> nn.Module:
        transformers: Any = pytest.importorskip("transformers")
        with keeping_state():
            torch.manual_seed(5)
            config = transformers.PatchTSTConfig(**self.forecast_recipe.config)
            return transformers.PatchTSTForPrediction(config).eval()

    @cached_property
    def windows(self) -> Any:
        pytest.importorskip("statsmodels")
        return data.load_forecasting("co2", "test", step=50)

    @cached_property
    def sae(self) -> Any:
        return saes.train(self.model, self.data, HOOK, d_sae=12, k=2, steps=3, **QUIET)

    @property
    def activations(self) -> Tensor:
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


@contextmanager
def keeping_state() -> Iterator[None]:
    kept = torch.get_rng_state()
    yield
    torch.set_rng_state(kept)


def act_patch(name: str) -> Callable[[World], Any]:
    return lambda w: getattr(patching, name)(*w.act_patch)


def drawn(name: str, result: str, **options: Any) -> Callable[[World], Any]:
    return lambda w: getattr(figures, name)(w.of(result), **options)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


PLANTED: Any = {"n_train": 24, "n_test": 8, "n_time": 48}
CALLS: dict[str, Callable[[World], Any]] = {
    # --- data
    "data.check_series": lambda w: data.check_series(w.data.series),
    "data.class_pairs": lambda w: data.class_pairs(w.data, 0, 1, 4),
    "data.corrupt_with_mean": lambda w: data.corrupt_with_mean(w.data),
    "data.corrupt_with_noise": lambda w: data.corrupt_with_noise(w.data),
    "data.corrupt_with_sample": lambda w: data.corrupt_with_sample(w.data, w.data[:1]),
    "data.corrupt_with_shift": lambda w: data.corrupt_with_shift(w.data, 2),
    "data.load_dataset": lambda w: data.load_dataset("ItalyPowerDemand", scaling="per_channel"),
    "data.load_described": lambda w: data.load_described({"name": "ItalyPowerDemand"}, "test"),
    "data.load_forecasting": lambda w: w.windows and data.load_forecasting("co2", step=50),
    "data.misclassified_pairs": lambda w: data.misclassified_pairs(w.model, w.data),
    "truth.planted": lambda w: truth.planted("low-var", **PLANTED),
    "truth.planted_features": lambda w: planted_features(20),
    "truth.planted_names": lambda w: truth.planted_names(),
    "data.recorded_series": lambda w: data.recorded_series(),
    "truth.score_features": lambda w: truth.score_features(noise(60, 5), noise(60, 4).relu()),
    "truth.score_states": lambda w: truth.score_states(torch.arange(60) % 5, torch.arange(60) % 4),
    "truth.score_where": lambda w: truth.score_where(
        noise(6, 2, 12), torch.arange(12).expand(6, 2, 12) < 4
    ),
    "data.RegimeMachine.sample": lambda w: w.machine.sample(4, 6),
    "data.Scaling.fit": lambda w: data.Scaling.fit(w.data, "per_channel").apply(w.data),
    # --- model
    "model.HookedTST": lambda w: w.fresh().state_dict(),
    "model.HookedTST.call": lambda w: w.model(w.data.series),
    "model.HookedTST.from_pretrained": lambda w: HookedTST.from_pretrained("gunpoint").state_dict(),
    "model.HookedTST.run_with_cache": lambda w: dict(w.model.run_with_cache(w.data.series)[1]),
    "model.HookedTST.run_with_hooks": lambda w: w.model.run_with_hooks(
        w.data.series, fwd_hooks=[(HOOK, lambda act, hook: act * 0)]
    ),
    "model.HookedTST.save_pretrained": lambda w: w.model.save_pretrained(w.place("model")),
    "model.HookedTST.conv": lambda w: HookedTST.from_pretrained("japanese-vowels").state_dict(),
    "model.describe_checkpoint": lambda w: model.describe_checkpoint("gunpoint"),
    "model.list_checkpoints": lambda w: model.list_checkpoints(),
    "model.seal_checkpoint": lambda w: model.seal_checkpoint(w.model.save_pretrained(w.place("m"))),
    "truth.component_names": lambda w: component_names(),
    "truth.component_task": lambda w: component_task("same-trend", **QUIET).model,
    # --- training
    "training.cross_validate": lambda w: training.cross_validate(w.recipe, n_folds=2),
    "training.errors_table": lambda w: training.errors_table(
        {"naive": w.of("training.forecast_errors")}
    ),
    "training.evaluate": lambda w: training.evaluate(w.model, w.data),
    "training.fit_forecast_recipe": lambda w: (
        w.forecaster and training.fit_forecast_recipe(w.forecast_recipe, **QUIET)
    ),
    "truth.fit_next_patch": lambda w: fitted_next_patch(w),
    "truth.fit_planted": lambda w: small_recipe(
        lambda: truth.fit_planted("low-var", n_test=8, **QUIET)
    ),
    "training.fit_recipe": lambda w: training.fit_recipe(w.recipe, **QUIET),
    "training.forecast_errors": lambda w: training.forecast_errors(
        torch.zeros_like(w.windows.future), w.windows
    ),
    "training.naive_forecasts": lambda w: training.naive_forecasts(w.windows),
    "truth.score_next_patch": lambda w: truth.score_next_patch(
        w.next_patch, w.machine, w.machine.sample(4, 6)
    ),
    "training.stratified_folds": lambda w: training.stratified_folds(w.data.labels, 3),
    "training.stratified_split": lambda w: training.stratified_split(w.data.labels, 0.5),
    "training.train": lambda w: trained(w),
    "training.Augment": lambda w: training.Augment(jitter=0.1, window=0.2, mixup=0.3)(
        w.data.series, torch.eye(2)[w.data.labels], generator=torch.Generator().manual_seed(0)
    ),
    # --- conversion
    "zoo.check_parity": lambda w: zoo.check_parity(
        w.model,
        w.model,
        [zoo.Trial("noise", (w.data.series,), lambda m, x: m(x), lambda m, x: m(x))],
        "itself",
    ),
    "zoo.compare": lambda w: zoo.compare(
        source := w.source, tstlens.convert(source), w.data.series
    ),
    "zoo.convert": lambda w: tstlens.convert(w.source).state_dict(),
    "zoo.convert.forecaster": lambda w: tstlens.convert(w.forecaster).state_dict(),
    "zoo.convert.state_dict": lambda w: tstlens.convert(
        w.forecaster.state_dict(), "patchtst", config=w.forecast_recipe.config
    ).state_dict(),
    "zoo.families": lambda w: zoo.families(),
    "zoo.register": lambda w: registered(),
    # --- patching
    "patching.ablate": lambda w: patching.ablate(
        w.model,
        w.pairs.clean,
        "z",
        ("layer", "head"),
        "resample",
        metric=w.metric,
        reference=w.data.series,
        **QUIET,
    ),
    "patching.agreement": lambda w: patching.agreement(
        w.of("patching.sweep"), w.of("patching.attribution"), 2
    ),
    "patching.alike_pairs": lambda w: patching.alike_pairs(w.model, w.data, 4),
    "patching.attention": lambda w: patching.attention(w.model, w.pairs.clean, **QUIET),
    "patching.attribution": lambda w: patching.attribution(
        *w.runs, "z", ("layer", "head"), w.metric, **QUIET
    ),
    "patching.campaign_grids": lambda w: patching.campaign_grids(w.model),
    "patching.component_graph": lambda w: patching.component_graph(w.model).edges,
    "patching.edge_attribution": lambda w: patching.edge_attribution(*w.runs, w.metric, **QUIET),
    "patching.edge_sweep": lambda w: patching.edge_sweep(
        *w.runs, w.metric, positions=False, **QUIET
    ),
    "patching.faithfulness": lambda w: patching.faithfulness(
        patching.Circuit.from_effects(w.of("patching.edge_sweep")),
        w.model,
        w.pairs,
        fractions=(0.5,),
        n_random=2,
        **QUIET,
    ),
    "patching.follow_paths": lambda w: patching.follow_paths(
        *w.runs, ["L0H0->L1H0.v"], w.metric, positions=False, **QUIET
    ),
    "patching.generic_activation_patch": lambda w: patching.generic_activation_patch(
        *w.act_patch, patching.layer_pos_patch_setter, "resid_pre", ("layer", "pos")
    ),
    "patching.head_influence": lambda w: patching.head_influence(*w.runs, **QUIET),
    "patching.lens": lambda w: patching.lens(w.model, w.pairs.clean, **QUIET),
    "patching.load_campaign": lambda w: loaded_campaign(w),
    "patching.log_prob": lambda w: patching.log_prob(w.pairs.target)(noise(4, 2)),
    "patching.logit": lambda w: patching.logit(w.pairs.target)(noise(4, 2)),
    "patching.logit_attribution": lambda w: patching.logit_attribution(
        w.model, w.pairs.clean, 0, **QUIET
    ),
    "patching.logit_diff": lambda w: patching.logit_diff(w.pairs.target, 1 - w.pairs.target)(
        noise(4, 2)
    ),
    "patching.make_df_from_ranges": lambda w: patching.make_df_from_ranges([2, 3], ["a", "b"]),
    "patching.crps": lambda w: patching.crps(w.windows).for_model(w.forecaster_model)(
        w.forecaster_model(w.windows.series)
    ),
    "patching.forecast": lambda w: patching.forecast("peak").for_model(w.forecaster_model)(
        w.forecaster_model(w.windows.series)
    ),
    "patching.mae": lambda w: patching.mae(w.windows).for_model(w.forecaster_model)(
        w.forecaster_model(w.windows.series)
    ),
    "patching.mase": lambda w: patching.mase(w.windows).for_model(w.forecaster_model)(
        w.forecaster_model(w.windows.series)
    ),
    "patching.mse": lambda w: patching.mse(noise(4, 1, 3))(torch.zeros(4, 1, 3)),
    "patching.null_map": lambda w: patching.null_map(
        w.model, w.pairs, "z", ("layer", "head"), **QUIET
    ),
    "patching.patch": lambda w: patching.patch(*w.runs, patching.Site("z", layer=0, head=0)),
    "patching.path_patch": lambda w: patching.path_patch(
        *w.runs, "L1H0.v", w.metric, positions=False, **QUIET
    ),
    "patching.prob": lambda w: patching.prob(w.pairs.target)(noise(4, 2)),
    "patching.quantile_loss": lambda w: patching.quantile_loss(noise(4, 1, 3), [0.5])(
        torch.zeros(4, 1, 3, 1)
    ),
    "patching.run_campaign": lambda w: campaign(w),
    "patching.site_names": lambda w: patching.site_names(w.model),
    "patching.split_half": lambda w: patching.split_half(w.of("patching.sweep"), 2),
    "patching.summary": lambda w: patching.summary(w.of("patching.sweep")),
    "patching.sweep": lambda w: patching.sweep(*w.runs, "z", ("layer", "head"), w.metric, **QUIET),
    "patching.window_sweep": lambda w: patching.window_sweep(*w.runs, w.metric, **QUIET),
    **{
        f"patching.{name}": act_patch(name)
        for name in patching.__all__
        if name.startswith("get_act_patch_")
    },
    # --- probing
    "probing.activations": lambda w: probing.activations(w.model, w.data, HOOK),
    **{
        f"probing.attribute.{method}": lambda w, method=method: attributed(w, method)
        for method in ("gradient_shap", "shapley_sampling", "kernel_shap", "permutation_shap")
    },
    "probing.attribute": lambda w: attributed(w, "integrated_gradients"),
    "probing.cka": lambda w: probing.cka(noise(20, 3), noise(20, 4)),
    "probing.cluster_effect": lambda w: probing.cluster_effect(
        w.model,
        w.sae,
        w.data,
        probing.clusters(
            w.model, w.data, sae=w.sae, what="latents", n_clusters=2, n_permutations=100
        ),
        n_draws=3,
        **QUIET,
    ),
    "probing.clusters": lambda w: probing.clusters(
        w.model, w.data, POST, n_clusters=2, n_permutations=100
    ),
    "probing.deletion_insertion": lambda w: probing.deletion_insertion(
        w.model, w.data[:4], 0, w.of("probing.attribute"), n_random=2, n_boot=100
    ),
    "probing.direction": lambda w: probing.direction(
        w.model, w.data[0::2], w.data[1::2], hook=POST
    ),
    **{
        f"probing.direction.{method}": lambda w, method=method: probing.direction(
            w.model, w.data[0::2], w.data[1::2], hook=POST, method=method
        )
        for method in ("lda", "probe")
    },
    "probing.dose_response": lambda w: probing.dose_response(
        w.model, w.data, w.of("probing.direction"), target=0, n_random=2, n_boot=100, **QUIET
    ),
    "probing.latent_direction": lambda w: probing.latent_direction(w.sae, 0),
    "probing.match_units": lambda w: probing.match_units(w.model, w.fresh(), w.data),
    "probing.prediction_difference": lambda w: probing.prediction_difference(
        w.model,
        w.data[:4],
        0,
        w.of("probing.attribute"),
        n_top=2,
        replacement=torch.zeros(4, 2, 12),
    ),
    **{f"probing.probe.{kind}": lambda w, kind=kind: probed(w, kind) for kind in ("ridge",)},
    "probing.probe": lambda w: probed(w, "logistic"),
    "probing.random_directions": lambda w: probing.random_directions(w.of("probing.direction"), 2),
    "probing.separability": lambda w: probing.separability(
        w.model, w.data[0::2], w.data[1::2], n_permutations=3, **QUIET
    ),
    "probing.similarity": lambda w: probing.similarity(w.model, None, w.data),
    "probing.skip_cost": lambda w: probing.skip_cost(w.model, w.data, **QUIET),
    "probing.surrogate": lambda w: probing.surrogate(w.model, w.data, 0, n_boot=100),
    "probing.surrogate.tree": lambda w: probing.surrogate(
        w.model, w.data, 0, kind="tree", n_boot=100
    ),
    "probing.units": lambda w: probing.units(w.model, w.data, HOOK, seeds=(0,), **QUIET),
    # --- report
    "report.build": lambda w: report.build(
        w.model, w.place("r.html"), data=w.data, max_pairs=4, **QUIET
    ).with_suffix(".json"),
    "report.forecast_card": lambda w: report.forecast_card(w.of("report.make_forecast_checkpoint")),
    "report.make_checkpoint": lambda w: made_checkpoint(w),
    "report.make_forecast_checkpoint": lambda w: report.make_forecast_checkpoint(
        w.forecaster, w.forecast_recipe, w.place("made"), command=""
    ),
    "report.model_card": lambda w: report.model_card(w.of("report.make_checkpoint")),
    "truth.truth": lambda w: truth.truth(
        "small",
        ["component"],
        seeds=[0],
        component={"names": ["same-trend"], "n_pairs": 4},
        **QUIET,
    ),
    # --- figures
    "figures.confusion": drawn("confusion", "training.evaluate"),
    "figures.draw": lambda w: [
        figures.draw(result)
        for result in (
            *(w.of(name) for name in DRAWN),
            patching.Circuit.from_effects(w.of("patching.edge_sweep")),
            agreement_of(w),
        )
    ],
    "truth.draw_truth": lambda w: truth.draw_truth(w.of("truth.truth").tables[0]),
    "figures.forecast": lambda w: figures.forecast(
        w.windows, 0, {"zero": torch.zeros_like(w.windows.future)}
    ),
    "figures.calendar": lambda w: figures.calendar(
        patching.window_sweep(
            w.forecaster_model,
            *w.windows.pair(-1, to="mean season"),
            patching.forecast("peak"),
            unit=26,
            **QUIET,
        )
    ),
    "figures.in_notebooks": lambda w: in_notebooks(),
    "patching.over_pairs": lambda w: patching.over_pairs(w.of("patching.sweep")),
    "figures.page": lambda w: paged(w),
    "figures.pair": lambda w: figures.pair(w.pairs, 0),
    "truth.planted_series": lambda w: truth.planted_series(w.of("truth.planted")),
    "figures.ranking": drawn("ranking", "patching.sweep"),
    "figures.series": lambda w: figures.series(w.data.series[0]),
}


DRAWN = (
    "probing.cluster_effect",
    "probing.clusters",
    "probing.match_units",
    "patching.edge_sweep",
    "patching.faithfulness",
    "patching.logit_attribution",
    "probing.deletion_insertion",
    "probing.direction",
    "probing.dose_response",
    "probing.attribute",
    "probing.separability",
    "probing.surrogate",
    "patching.lens",
    "patching.attention",
    "patching.ablate",
    "patching.agreement",
    "patching.run_campaign",
    "patching.head_influence",
    "probing.probe",
    "probing.similarity",
    "probing.skip_cost",
    "patching.split_half",
    "patching.summary",
    "patching.sweep",
    "probing.units",
)


def agreement_of(w: World) -> Any:
    sites = torch.zeros(4, dtype=torch.int64)
    series = w.data.series[:4]
    swept = patching.sweep(
        w.model, series, torch.zeros(4, 2, 12), "embed", ("pos",), patching.logit(sites), **QUIET
    )
    return w.of("probing.attribute").agreement(swept)


def fitted_next_patch(w: World) -> Any:
    changed = w.next_patch
    return truth.fit_next_patch(
        changed, w.machine, n_pos=6, steps=3, batch_size=4, **QUIET
    ), changed


def trained(w: World) -> Any:
    changed = w.source
    return training.train(changed, w.data, epochs=2, batch_size=8, **QUIET).history, changed


def attributed(w: World, method: str) -> Any:
    pytest.importorskip("shap" if method == "permutation_shap" else "captum")
    few = {} if method == "integrated_gradients" else {"n_samples": 2}
    return probing.attribute(w.model, w.data[:4], 0, method=method, baseline="zero", **few, **QUIET)


def probed(w: World, kind: Any) -> Any:
    return probing.probe(
        w.model, w.data, hooks=POST, kind=kind, n_folds=2, n_shuffles=1, n_boot=100, **QUIET
    )


def campaign(w: World) -> Any:
    grids = [("z", ("layer", "head"))]
    return patching.run_campaign(w.model, w.pairs, w.place("campaign"), grids=grids, **QUIET)


def loaded_campaign(w: World) -> Any:
    folder = w.place("campaign")
    grids = [("z", ("layer", "head"))]
    patching.run_campaign(w.model, w.pairs, folder, grids=grids, figures=False, **QUIET)
    return patching.load_campaign(folder)


def made_checkpoint(w: World) -> HookedTST:
    with keeping_state():
        torch.manual_seed(5)
        source = training.ConvTST(w.recipe.config)
    return report.make_checkpoint(
        source.eval(), w.place("made"), data="ItalyPowerDemand", recipe={}, seed=0, command=""
    )


def paged(w: World) -> None:
    figures.page(
        saes.features(w.model, w.sae, w.data, n_permutations=100, **QUIET), w.place("p.html")
    )


def in_notebooks() -> str:
    import plotly.io

    before = plotly.io.renderers.default, plotly.io.templates.default
    try:
        return figures.in_notebooks()
    finally:
        plotly.io.renderers.default, plotly.io.templates.default = before


def of_spliced() -> dict[str, Callable[[World], Any]]:
    """Rows of the rooms that need sae-lens."""
    return {
        # --- saes
        "saes.ablate_latent": lambda w: saes.ablate_latent(w.model, w.sae, w.data, 0, n_controls=2),
        "saes.architectures": lambda w: saes.architectures(),
        "saes.browse": lambda w: (
            saes.browse(w.model, w.sae, w.data, w.place("b.html"), n_permutations=100, **QUIET)
            and None
        ),
        "saes.compare": lambda w: saes.compare(w.sae, w.of("saes.random_dictionary")),
        "saes.feature_graph": lambda w: saes.feature_graph(
            w.model,
            w.sae,
            w.data,
            lambda output: output[:, 0],
            n_latents=3,
            n_edges=4,
            n_exact=4,
            n_controls=2,
            **QUIET,
        ),
        "saes.features": lambda w: saes.features(
            w.model, w.sae, w.data, n_permutations=100, **QUIET
        ),
        "saes.fit": lambda w: saes.fit(
            w.activations, d_sae=12, k=2, steps=3, batch_size=16, **QUIET
        ),
        **{
            f"saes.fit.{kind}": lambda w, kind=kind: saes.fit(
                w.activations, kind, d_sae=12, steps=3, batch_size=16, **QUIET
            )
            for kind in ("standard", "batchtopk", "gated", "jumprelu")
        },
        "saes.from_linear": lambda w: saes.from_linear(
            {
                "encoder.weight": noise(12, 8),
                "encoder.bias": noise(12),
                "decoder.weight": noise(8, 12),
                "decoder.bias": noise(8),
            },
            HOOK,
        ),
        "saes.history": lambda w: saes.history(w.sae),
        "saes.latents": lambda w: saes.latents(w.model, w.sae, w.data),
        "saes.list_saes": lambda w: saes.list_saes("japanese-vowels"),
        "saes.load": lambda w: saes.load("japanese-vowels", saes.list_saes("japanese-vowels")[0]),
        "saes.neuron_dictionary": lambda w: saes.neuron_dictionary(w.sae, w.activations, 2),
        "saes.random_dictionary": lambda w: saes.random_dictionary(w.sae, w.activations, 2),
        "truth.recovery": lambda w: truth.recovery(w.sae, noise(5, 8)),
        "saes.save": lambda w: saes.save(w.sae, w.place("sae")),
        "saes.score": lambda w: saes.score(w.model, w.sae, w.data),
        "saes.steer_latent": lambda w: saes.steer_latent(w.model, w.sae, w.data, 0, n_controls=2),
        "saes.train": lambda w: saes.train(w.model, w.data, HOOK, d_sae=12, k=2, steps=3, **QUIET),
        "saes.training_config": lambda w: saes.training_config("topk", 8, d_sae=12),
        "saes.reading.activity_of": lambda w: reading.activity_of(w.model, w.sae, w.data),
        "saes.reading.class_association": lambda w: reading.class_association(
            w.of("saes.reading.activity_of"), w.data.labels.numpy(), 2, n_permutations=100
        ),
        "saes.reading.output_effects": lambda w: reading.output_effects(w.model, w.sae, w.data),
        "saes.reading.property_association": lambda w: reading.property_association(
            w.of("saes.reading.activity_of"),
            importlib.import_module("tstlens.saes.reading.result").window_properties(
                w.data,
                w.of("saes.reading.activity_of"),
                tuple((2 * pos, 2 * pos + 2) for pos in range(6)),
            ),
        ),
        "truth.feature_scores": lambda w: truth.feature_scores([0], n_train=256, steps=2, **QUIET)[
            0
        ],
        "truth.where_scores": lambda w: small_recipe(
            lambda: truth.where_scores(["low-var"], [0], n_series=4, n_references=2, **QUIET)[0]
        ),
        # --- codebooks
        "codebooks.ban_nearest": lambda w: logits_without_nearest(w),
        "codebooks.browse": lambda w: (
            codebooks.browse(w.book_model, w.data, w.place("c.html"), **QUIET) and None
        ),
        "codebooks.effects": lambda w: codebooks.effects(
            w.book_model, w.data, {HOOK: 0}, label=0, n_controls=2, **QUIET
        ),
        "codebooks.fit": lambda w: codebooks.fit(
            w.fresh(), w.data, [HOOK], n_codes=6, epochs=2, **QUIET
        ),
        "codebooks.fit.together": lambda w: codebooks.fit(
            w.fresh(), w.data, [HOOK], n_codes=6, epochs=2, train_model=True, **QUIET
        ),
        "truth.fit_regime": lambda w: truth.fit_regime(
            copy.deepcopy(w.of("truth.regime_model")),
            w.machine,
            ["blocks.0.hook_resid_post"],
            n_series=8,
            n_codes=6,
            epochs=1,
            **QUIET,
        ),
        "codebooks.load": lambda w: codebooks.load("japanese-vowels"),
        "codebooks.make_codebooks": lambda w: codebooks.make_codebooks(
            "italy-power-demand", [HOOK], w.place("made"), n_codes=6, epochs=1, sae_steps=2, **QUIET
        )[0],
        "truth.regime_experiment": lambda w: truth.regime_experiment(
            [0],
            hooks=["blocks.0.hook_resid_post"],
            machine={"n_states": 12, "n_edges": 2, "n_prototypes": 4, "patch_len": 4},
            model={"n_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 8, "n_pos": 4},
            steps=3,
            n_fit=16,
            n_score=16,
            min_support=1,
            n_codes=6,
            epochs=1,
            **QUIET,
        ),
        "truth.regime_model": lambda w: truth.regime_model(
            w.machine, n_pos=4, n_layers=1, d_model=8, n_heads=2, d_mlp=8
        ),
        "codebooks.score": lambda w: codebooks.score(
            w.book_model, w.data, train=w.data, sae_steps=2
        ),
        "truth.score_regime": lambda w: truth.score_regime(
            regime_with_codes(w), w.machine, n_series=16, min_support=1
        ),
        "codebooks.start": lambda w: codebooks.start(
            w.model, w.data, [HOOK], codebooks.CodebookConfig(n_codes=6)
        ),
    }


def logits_without_nearest(w: World) -> Any:
    with codebooks.ban_nearest(w.book_model) as model:
        return model(w.data.series)


def small_recipe(call: Callable[[], Any]) -> Any:
    """A call with a planted recipe that trains for an epoch on 32 series."""
    from tstlens.truth.training import PLANTED_RECIPES

    kept = PLANTED_RECIPES["low-var"]
    few: Any = {"n_train": 32, "training": {**kept.training, "epochs": 1}}
    PLANTED_RECIPES["low-var"] = dataclasses.replace(kept, **few)
    try:
        return call()
    finally:
        PLANTED_RECIPES["low-var"] = kept


def regime_with_codes(w: World) -> HookedTST:
    changed = copy.deepcopy(w.of("truth.regime_model"))
    hooks = ["blocks.0.hook_resid_post"]
    truth.fit_regime(changed, w.machine, hooks, n_series=8, n_codes=6, epochs=1, **QUIET)
    return changed


def registered() -> None:
    from tstlens.zoo import registry

    family = registry.known().pop("conv-tst")
    zoo.register(family)


if NO_SAES is None:
    CALLS |= of_spliced()

# In place, by their own word: the weights of a model and the mode that it is left in.
GLOBAL = {
    "torch": lambda: torch.get_rng_state().numpy().tobytes(),
    "cuda": lambda: (
        [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()
        else []
    ),
    "numpy": lambda: [repr(np.asarray(part).tolist()) for part in np.random.get_state()],
    "random": random.getstate,
    "threads": torch.get_num_threads,
    "dtype": torch.get_default_dtype,
    "device": lambda: str(torch.get_default_device()),
    "gradients": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "deterministic": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.matmul.allow_tf32,
    ),
    "numpy's errors": np.geterr,
    "numpy's printing": lambda: repr(np.get_printoptions()),
    "warnings": lambda: list(warnings.filters),
    "pandas": lambda: repr(pd.options.display.max_rows),
}


def state_of(source: nn.Module) -> dict[str, Any]:
    """What an analysis may not change in a model: modes, hooks, gradients, weights."""
    return {
        "modes": [module.training for module in source.modules()],
        "hooks": [
            [*module._forward_hooks, *module._backward_hooks, *module._forward_pre_hooks]
            for module in source.modules()
        ],
        "gradients": [(p.requires_grad, p.grad is None) for p in source.parameters()],
        "weights": [p.detach().double().sum().item() for p in source.parameters()],
    }


def content(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Numbers and names that a result holds, to compare with another's."""
    if value is None or isinstance(value, str | bool | int | bytes):
        return value
    if isinstance(value, float | np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, pd.DataFrame | pd.Series):
        return value.to_csv()
    if isinstance(value, go.Figure):
        return value.to_json()
    if isinstance(value, nn.Module):
        return content(dict(value.state_dict()), seen)
    if isinstance(value, Path):
        return read(value)
    if id(value) in seen:
        return None
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return {str(k): content(v, seen) for k, v in value.items() if str(k) not in TIMES}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, Sequence):
        return [content(entry, seen) for entry in value]
    if callable(value):
        return None
    return content(vars(value), seen) if hasattr(value, "__dict__") else repr(value)


TIMES = ("seconds", "of_exact", "folder", "path", "threads")


def read(path: Path) -> Any:
    if path.is_dir():
        return [[part.name, read(part)] for part in sorted(path.rglob("*")) if part.is_file()]
    if path.suffix == ".json":
        import json

        return content(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def public_functions() -> dict[str, Any]:
    found = {}
    for room in ROOMS[1:] + ROOMS[:1]:
        if NO_SAES is not None and room.split(".")[1:2] in (["saes"], ["codebooks"]):
            continue
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name, None)
            if inspect.isfunction(value) and value not in found.values():
                found[f"{room.removeprefix('tstlens.')}.{name}"] = value
    return found


def test_every_public_function_has_a_row():
    # Minutes each, and parts of truth.truth, which has a row.
    slow = {"truth.component_scores", "truth.state_scores"}
    missing = [name for name in public_functions() if name not in CALLS and name not in slow]
    assert not missing, f"no small call in CALLS for {missing}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def caller(seed: int) -> None:
    """A caller with random states of its own."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.usefixtures("no_shape_checks")  # they draw from Python's random
@pytest.mark.parametrize("name", CALLS)
def test_the_caller_finds_everything_as_it_was(name, world):
    caller(1)
    first = content(world.of(name))  # imports are over, and what others rest on is there
    caller(2)
    before = {what: state() for what, state in GLOBAL.items()}
    model_before = state_of(world.model)
    again = content(CALLS[name](world))
    changed = [what for what, state in GLOBAL.items() if state() != before[what]]
    assert not changed, f"{name} changes {changed}"
    assert state_of(world.model) == model_before
    compare(first, again, name)


def compare(first: Any, again: Any, place: str) -> None:
    """The same but for what another place in memory does to the last digits of a sum."""
    assert type(first) is type(again), place
    if isinstance(first, np.ndarray) and first.dtype.kind in "fc":
        np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-6, err_msg=place)
    elif isinstance(first, np.ndarray):
        np.testing.assert_array_equal(first, again, err_msg=place)
    elif isinstance(first, dict | list):
        assert list(first) == list(again) if isinstance(first, dict) else len(first) == len(again)
        for key in first if isinstance(first, dict) else range(len(first)):
            compare(first[key], again[key], f"{place}.{key}")
    else:
        assert first == again, place


def test_scikit_learn_is_imported_where_the_random_state_is_kept():
    """What it imports draws from Python's random state, on whoever's first call it is."""
    outside = []
    for path in sorted(Path(tstlens.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kept = {
            inside
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and any("seeded" in ast.unparse(entry) for entry in function.decorator_list)
            for inside in ast.walk(function)
        }
        outside += [
            f"{path}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] in ("sklearn", "shap")
            and node not in kept
        ]
    assert not outside
