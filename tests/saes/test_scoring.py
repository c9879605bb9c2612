"""Scores against the numbers by hand, controls, and what is planted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import evals
from sae_lens.training.activation_scaler import ActivationScaler

from tstlens import codebooks, saes
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
QUICK = {"d_sae": 16, "k": 3, "steps": 60, "batch_size": 64, "progress": False}


@pytest.fixture
def sae(model, data):
    return saes.train(model, data, MLP_OUT, **QUICK)


def observed(model, data, hook):
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=[hook])
    return cache[hook] if data.mask is None else cache[hook][data.mask]


def test_scores_are_the_numbers_by_hand(model, data, sae):
    scores = saes.score(model, sae, data)
    x = observed(model, data, MLP_OUT)
    latents = sae.encode(x)
    error = x - sae.decode(latents)
    row = scores.trained
    assert scores.n_activations == len(x) == 344  # padding left out
    assert row.mse == pytest.approx(float(error.pow(2).mean()), rel=1e-5)
    explained = 1 - error.pow(2).mean() / (x - x.mean(0)).pow(2).mean()
    assert row.explained_variance == pytest.approx(float(explained), rel=1e-5)
    assert row.l0 == pytest.approx(float((latents != 0).float().sum(1).mean()))
    np.testing.assert_allclose(row.density, (latents != 0).float().mean(0), atol=1e-6)
    assert row.n_dead == int(((latents != 0).sum(0) == 0).sum())
    assert f"trained: explained variance {float(explained):.3f}, l0 3.0" in repr(scores)


def test_the_task_is_measured_raw_with_the_activation_kept_spliced_and_ablated(model, data, sae):
    scores = saes.score(model, sae, data)
    mean = observed(model, data, MLP_OUT).mean(0)
    runs = {
        "original": lambda x, hook: x,
        "zero": lambda x, hook: torch.zeros_like(x),
        "mean": lambda x, hook: mean.expand_as(x),
    }
    for kind, edit in runs.items():
        hooks = [(MLP_OUT, edit)]
        out = model.run_with_hooks(data.series, mask=data.mask, fwd_hooks=hooks)
        assert scores.task[kind]["cross_entropy"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(out, data.labels)), rel=1e-5
        )
        right = (out.argmax(1) == data.labels).float().mean()
        assert scores.task[kind]["accuracy"] == pytest.approx(float(right))
    spliced = model.run_with_saes(data.series, mask=data.mask, saes=sae)
    loss = torch.nn.functional.cross_entropy(spliced, data.labels)
    assert scores.trained.task["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)
    frame = scores.to_dataframe()
    assert list(frame["dictionary"]) == ["trained", "random, topk", "random, pursuit", "neurons"]
    wanted = {f"{m}_{kind}" for m in ("accuracy", "cross_entropy") for kind in runs}
    assert wanted <= set(frame.columns)


def test_scoring_leaves_the_model_and_what_is_spliced_in_as_they_were(model, data, sae):
    other = saes.train(model, data, MLP_OUT, seed=1, **QUICK)
    model.add_sae(other)
    with pytest.raises(LookupError):  # the activation that is read is not there any more
        saes.score(model, sae, data)
    assert model.acts_to_saes == {MLP_OUT: other}
    model.reset_saes()
    before, points = model(data.series), list(model.hook_dict)
    saes.score(model, sae, data)
    assert torch.equal(model(data.series), before) and list(model.hook_dict) == points


def test_controls_are_as_large_and_as_sparse_and_explain_less(model, data):
    sae = saes.train(model, data, MLP_OUT, **{**QUICK, "steps": 800, "lr": 3e-3})
    trained, random, pursuit, neurons = saes.score(model, sae, data).rows
    assert trained.n_latents == random.n_latents == pursuit.n_latents == 16
    assert neurons.n_latents == 2 * 8
    for control in (random, pursuit, neurons):
        assert control.l0 <= round(trained.l0) + 1e-6
        assert control.explained_variance < trained.explained_variance
    assert random.explained_variance >= 0  # scaled by least squares, so no worse than the mean


def test_neurons_keep_the_entries_furthest_from_the_mean(model, data, sae):
    x = observed(model, data, MLP_OUT).detach()
    neurons = saes.neuron_dictionary(sae, x, k=3)
    centred = x - x.mean(0)
    kept = torch.zeros_like(x).scatter(1, centred.abs().topk(3).indices, 1.0)
    torch.testing.assert_close(neurons(x), x.mean(0) + centred * kept, atol=1e-5, rtol=0)


def test_a_random_dictionary_is_no_copy_of_what_the_same_seed_plants(model, data, sae):
    """Seed 0 draws a user's planted features as readily as the control's directions."""
    x = observed(model, data, MLP_OUT).detach()
    planted = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    control = saes.random_dictionary(sae, x, k=3, seed=0)
    cosines = torch.nn.functional.cosine_similarity(planted, control.W_dec.detach())
    assert cosines.abs().mean() < 0.6


@pytest.mark.parametrize("head", ["joined", "each", 1])
def test_dictionaries_of_heads_are_scored(model, full, head):
    sae = saes.train(model, full, Z, head=head, **QUICK)
    scores = saes.score(model, sae, full)
    z = observed(model, full, Z)
    z = {"joined": z.flatten(-2), "each": z, 1: z[..., 1, :]}[head].reshape(-1, sae.cfg.d_in)
    assert scores.n_activations == len(z)

    def ablated(acts, hook):
        acts = acts.clone()
        acts[:, :, 1 if head == 1 else slice(None)] = 0.0
        return acts

    out = model.run_with_hooks(full.series, fwd_hooks=[(Z, ablated)])
    loss = torch.nn.functional.cross_entropy(out, full.labels)
    assert scores.task["zero"]["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)
    assert len(scores.rows) == 4


def test_transcoders_and_forecasters(model, data, make_model):
    from tstlens.model import HeadConfig

    options = {"d_sae": 16, "steps": 30, "batch_size": 64, "progress": False}
    transcoder = saes.train(
        model, data, "blocks.0.hook_resid_mid", "skip_transcoder", hook_out=MLP_OUT, **options
    )
    assert len(saes.score(model, transcoder, data).rows) == 1
    forecaster = make_model(head=HeadConfig("mean", horizon=5))
    sae = saes.train(forecaster, data, MLP_OUT, **options)
    target = torch.randn(40, 3, 5)
    scores = saes.score(forecaster, sae, data, target=target)
    expected = (forecaster(data.series, mask=data.mask) - target).pow(2).mean()
    assert scores.task["original"] == {"mse": pytest.approx(float(expected), rel=1e-5)}
    row: Any = saes.score(model, transcoder, data).trained
    read = observed(model, data, "blocks.0.hook_resid_mid")
    found, written = transcoder(read), observed(model, data, MLP_OUT)
    ratio = (found.norm(dim=1) / written.norm(dim=1)).mean()
    assert row.l2_ratio == pytest.approx(float(ratio), rel=1e-5)
    cosine = torch.cosine_similarity(found, written).mean()
    assert row.cosine == pytest.approx(float(cosine), abs=1e-6)


def test_the_density_histogram_counts_the_living(model, data, sae):
    scores = saes.score(model, sae, data)
    counts = scores.density_histogram().groupby("dictionary")["latents"].sum()
    for row in scores.rows:
        assert counts[row.name] == row.n_latents - row.n_dead


def test_errors_say_what_is_wrong(model, data, sae):
    unlabelled = TimeSeriesData(data.series)
    with pytest.raises(ArgumentError, match="labels, or target= for a forecaster"):
        saes.score(model, sae, unlabelled)
    sae.cfg.metadata.hook_name = None
    with pytest.raises(ArgumentError, match="does not say its hook point"):
        saes.score(model, sae, data)


class Univariate:
    """A HookedTST as sae-lens' evaluations call a model: on tokens [batch, pos], with a loss."""

    def __init__(self, model, labels):
        self.model, self.labels = model, labels
        self.mask: torch.Tensor | None = None

    def __call__(self, tokens, return_type, loss_per_token):
        return self._both(self.model(tokens[:, None], mask=self.mask))

    def run_with_hooks(self, tokens, return_type, fwd_hooks, loss_per_token):
        given = {"mask": self.mask, "fwd_hooks": fwd_hooks}
        return self._both(self.model.run_with_hooks(tokens[:, None], **given))

    def run_with_cache(self, tokens, prepend_bos, **options):
        return self.model.run_with_cache(tokens[:, None], mask=self.mask, **options)

    def _both(self, output):
        return output, torch.nn.functional.cross_entropy(output, self.labels, reduction="none")


ARCHITECTURES = ("standard", "topk", "batchtopk", "gated", "jumprelu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hook", [MLP_OUT, Z])
def test_scores_are_those_of_sae_lens_own_evaluations(make_model, data, architecture, hook):
    model = make_model(n_channels=1)
    one = TimeSeriesData(data.series[:, :1], data.labels, data.class_names)
    quick = {"d_sae": 16, "steps": 20, "batch_size": 64, "progress": False}
    sae = saes.train(model, one, hook, architecture, **quick)
    row = saes.score(model, sae, one, controls=False).trained
    scores = saes.score(model, sae, one, controls=False)
    adapted: Any = [sae, Univariate(model, one.labels)]
    if hook == Z:
        sae.turn_off_forward_pass_hook_z_reshaping()
    tokens, scaler = one.series[:, 0], ActivationScaler()
    store: Any = [SimpleNamespace(get_batch_tokens=lambda n: tokens), scaler]
    names = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    theirs, latents = evals.get_sparsity_and_variance_metrics(
        *adapted,
        *store,
        n_batches=1,
        eval_batch_size_prompts=40,
        model_kwargs={},
        **{f"compute_{name}": True for name in names},
    )
    ours = {
        "l0": row.l0,
        "l1": row.l1,
        "mse": row.mse * sae.cfg.d_in,  # the sum over entries is theirs
        "cossim": row.cosine,
        "l2_ratio": row.l2_ratio,
        "relative_reconstruction_bias": row.relative_reconstruction_bias,
        "explained_variance": row.explained_variance,
    }
    assert ours == pytest.approx({name: theirs[name] for name in ours}, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(row.density, latents["feature_density"], atol=1e-6)
    effects = evals.get_recons_loss(*adapted, scaler, tokens, compute_kl=True, compute_ce_loss=True)
    means = {name: float(part.mean()) for name, part in effects.items()}
    assert {
        "kl_div_with_sae": row.task["kl_divergence"],
        "kl_div_with_ablation": scores.task["zero"]["kl_divergence"],
        "ce_loss_with_sae": row.task["cross_entropy"],
        "ce_loss_without_sae": scores.task["original"]["cross_entropy"],
        "ce_loss_with_ablation": scores.task["zero"]["cross_entropy"],
    } == pytest.approx(means, rel=1e-4, abs=1e-6)
    assert scores.task["original"]["kl_divergence"] == 0
    weights = evals.get_featurewise_weight_based_metrics(sae)
    found = scores.latents_dataframe()
    for name, column in {
        "encoder_norm": "encoder_norm",
        "encoder_decoder_cosine_sim": "encoder_decoder_cosine",
    }.items():
        np.testing.assert_allclose(found[column], weights[name], rtol=1e-4, atol=1e-6)


def test_shrinkage_and_cosine_of_a_dictionary_that_scales_what_it_reads(model, data):
    """All that neurons see, times .5: half the norm, cosine 1, bias .5."""
    x = observed(model, data, MLP_OUT)
    sae = saes.train(model, data, MLP_OUT, "standard", **{**QUICK, "k": None, "steps": 1})
    halves = saes.neuron_dictionary(sae, x, k=8)
    with torch.no_grad():
        halves.b_dec.zero_()
        halves.W_enc.mul_(2)
        halves.W_dec.copy_(halves.W_enc.T / 8)
    row: Any = saes.score(model, halves, data, controls=False).trained
    assert row.l2_ratio == pytest.approx(0.5, rel=1e-5)
    assert row.cosine == pytest.approx(1, rel=1e-5)
    assert row.relative_reconstruction_bias == pytest.approx(0.5, rel=1e-5)
    assert row.l1 == pytest.approx(2 * float(x.abs().sum(1).mean()), rel=1e-5)
    np.testing.assert_allclose(row.encoder_norm, 2.0, rtol=1e-6)
    np.testing.assert_allclose(row.encoder_decoder_cosine, 1.0, rtol=1e-6)


def test_a_dictionary_that_gives_nothing_has_no_direction(model, data):
    sae = saes.train(model, data, MLP_OUT, "standard", **{**QUICK, "k": None, "steps": 1})
    with torch.no_grad():
        for part in (sae.W_dec, sae.b_dec):
            part.zero_()
    row = saes.score(model, sae, data, controls=False).trained
    assert (row.cosine, row.l2_ratio) == (0, 0) and np.isnan(row.relative_reconstruction_bias)
    np.testing.assert_array_equal(row.encoder_decoder_cosine, 0)


def test_a_dictionary_without_an_encoder_has_no_norms_of_one(model, data):
    sizes = {"n_codes": 6, "k": 2, "epochs": 1, "batch_size": 20, "progress": False}
    (book,) = codebooks.fit(model, data, [MLP_OUT], **sizes).values()
    model.reset_saes()
    scores = saes.score(model, book, data)
    assert scores.trained.encoder_norm is None and scores.trained.encoder_decoder_cosine is None
    assert scores.trained.l1 == pytest.approx(2.0)  # two codes, each counted once
    assert np.isnan(scores.latents_dataframe()["encoder_norm"].to_numpy()[:6]).all()
