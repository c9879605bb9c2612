"""Effects of removing and adding latents, against serial hooks and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import sae_lens
import torch

from tests.saes import hand_made as made
from tstlens.errors import ArgumentError
from tstlens.saes.reading import ablate_latent, output_effects, steer_latent
from tstlens.saes.reading.activity import directions


def real_sae(kind, hook, width, d_sae=12, **options):
    """An untrained SAE of sae-lens whose latents are active."""
    torch.manual_seed(1)
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook)
    common = {"d_in": width, "d_sae": d_sae, "metadata": metadata, **options}
    if kind == "topk":
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(k=3, **common))
    else:
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**common))
    with torch.no_grad():
        sae.b_dec.copy_(0.1 * torch.randn(width))
        sae.b_enc.copy_(0.2 * torch.randn(d_sae))
        sae.W_enc.copy_(torch.randn(width, d_sae) / width**0.5)
    return sae.eval()


def without(sae, latent, activation):
    """The activation less what the decoder loses when a latent is set to zero, norms and all."""
    latents = sae.encode(activation)
    whole = sae.decode(latents)
    cut = sae.encode(activation).clone()
    cut[..., latent] = 0
    return activation - whole + sae.decode(cut)


SAES = {
    "standard": ("standard", "blocks.0.hook_mlp_out", 8, {}),
    "topk": ("topk", "blocks.1.hook_resid_post", 8, {}),
    "topk, rescaled": (
        "topk",
        "blocks.0.hook_mlp_out",
        8,
        {"rescale_acts_by_decoder_norm": True},
    ),
    "layer norm": (
        "standard",
        "blocks.1.hook_mlp_out",
        8,
        {"normalize_activations": "layer_norm"},
    ),
    "joined z": (
        "standard",
        "blocks.0.attn.hook_z",
        8,
        {"reshape_activations": "hook_z"},
    ),
    "embedding": ("standard", "hook_embed", 8, {}),
}


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_effects_are_those_of_a_serial_run_without_the_latent(name, norm_position):
    kind, hook, width, options = SAES[name]
    model = made.per_step(n_layers=2, norm_position=norm_position)
    data = made.labelled(n=5, n_time=16, padded=True)
    sae = real_sae(kind, hook, width, **options)
    found = output_effects(model, sae, data, n_series=5, batch_size=4)
    before = model(data.series, mask=data.mask).detach()
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=hook)
    latents = sae.encode(cache[hook]) * data.mask[:, :, None]
    strongest = latents.amax(1)
    for latent in range(0, 12, 3):

        def edit(activation, hook, latent=latent):
            edited = without(sae, latent, activation)
            keep = data.mask.view(*data.mask.shape, *[1] * (activation.ndim - 2))
            return torch.where(keep, edited, activation)

        after = model.run_with_hooks(data.series, mask=data.mask, fwd_hooks=[(hook, edit)])
        rows = strongest[:, latent] > 0
        assert found.n_series[latent] == int(rows.sum())
        if rows.any():
            expected = (after - before)[rows].mean(0).detach().numpy()
            np.testing.assert_allclose(found.change[latent], expected, atol=2e-5)
            probability = (after.softmax(-1) - before.softmax(-1))[rows].mean(0).detach().numpy()
            np.testing.assert_allclose(found.probability[latent], probability, atol=2e-5)


def test_a_dictionary_of_one_head_writes_to_that_head_only():
    model, data = made.per_step(n_layers=1), made.labelled(n=4)
    dictionary = made.random_dictionary(4, 6, "blocks.0.attn.hook_z", hook_head_index=1)
    found = output_effects(model, dictionary, data, n_series=4)

    def edit(z, hook):
        z = z.clone()
        active = torch.relu(z[:, :, 1] @ dictionary.W_enc - dictionary.threshold)[:, :, 2]
        z[:, :, 1] -= active[..., None] * dictionary.W_dec[2]
        return z

    after = model.run_with_hooks(data.series, fwd_hooks=[("blocks.0.attn.hook_z", edit)])
    difference = (after - model(data.series)).detach()
    rows = difference.abs().sum(1) > 1e-9
    np.testing.assert_allclose(found.change[2], difference[rows].mean(0).numpy(), atol=1e-5)


def test_a_transcoder_is_read_at_one_hook_and_edited_at_the_other():
    model, data = made.per_step(n_layers=1), made.labelled(n=4)
    model.set_use_hook_mlp_in(True)
    reads, writes = "blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"
    dictionary = made.random_dictionary(8, 6, reads, hook_name_out=writes)
    found = output_effects(model, dictionary, data, n_series=4)
    _, cache = model.run_with_cache(data.series, names_filter=reads)
    amount = dictionary.encode(cache[reads])[:, :, 1]

    def edit(out, hook):
        return out - amount[..., None] * dictionary.W_dec[1]

    after = model.run_with_hooks(data.series, fwd_hooks=[(writes, edit)])
    rows = amount.amax(1) > 0
    expected = (after - model(data.series))[rows].mean(0).detach().numpy()
    np.testing.assert_allclose(found.change[1], expected, atol=1e-5)


def test_forecasts_change_per_step_and_channel_independent_rows_belong_together():
    model, data = made.per_channel(), made.labelled(n=4, n_channels=3, n_time=32)
    dictionary = made.random_dictionary(8, 6, "blocks.1.hook_mlp_out", threshold=0.1)
    found = output_effects(model, dictionary, data, n_series=4, batch_size=3)
    hook = "blocks.1.hook_mlp_out"
    _, cache = model.run_with_cache(data.series, names_filter=hook)
    latents = dictionary.encode(cache[hook])
    for latent in range(6):

        def edit(out, hook, latent=latent):
            return out - latents[:, :, latent, None] * dictionary.W_dec[latent]

        after = model.run_with_hooks(data.series, fwd_hooks=[(hook, edit)])
        rows = latents[:, :, latent].unflatten(0, (4, 3)).amax((1, 2)) > 0
        expected = (after - model(data.series))[rows].mean((0, 1)).detach().numpy()
        np.testing.assert_allclose(found.change[latent], expected, atol=1e-5)
    assert found.task == "forecast" and found.probability is None


def linear_model():
    """A block that adds nothing: logits are the mean embedding times W_U, a closed form."""
    model = made.read_channels(made.per_step(n_layers=1, norm_position="pre", final_norm=False))
    with torch.no_grad():
        for name, weight in model.blocks.named_parameters():
            if name.rsplit(".", 1)[-1] in ("W_O", "b_O", "W_out", "b_out"):
                weight.zero_()
    return model, made.axis_dictionary(model, n_latents=2)


@pytest.mark.parametrize("padded", [False, True])
def test_ablation_doses_are_linear_in_a_linear_model_and_equal_the_closed_form(padded):
    model, dictionary = linear_model()
    data = made.labelled(n=10, padded=padded)
    found = ablate_latent(model, dictionary, data, 1, doses=(0.5, 1.0), n_controls=1)
    seen = torch.ones(10, 16, dtype=torch.bool) if data.mask is None else data.mask
    for row, series in enumerate(found.series.tolist()):
        active = torch.relu(data.series[series, 1] - 0.5) * seen[series]
        expected = -(active.sum() / seen[series].sum()) * model.W_U[1]
        logits = found.change("logit")[:, row].float()
        torch.testing.assert_close(logits[1], expected.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[0], expected.detach() / 2, atol=1e-5, rtol=1e-4)
    assert found.control_latents == (0,)


@pytest.mark.parametrize("padded", [False, True])
def test_steering_adds_the_direction_at_every_observed_position(padded):
    model, dictionary = linear_model()
    data = made.labelled(n=10, padded=padded)
    found = steer_latent(model, dictionary, data, 0, doses=(-1, 3), unit=0.5, n_controls=1)
    for dose, logits in zip((-1, 3), found.change("logit"), strict=True):
        expected = (0.5 * dose * model.W_U[0]).detach().expand(10, -1)
        torch.testing.assert_close(logits.float(), expected, atol=1e-5, rtol=1e-4)
    unit = steer_latent(model, dictionary, data, 0, doses=(1,), n_controls=0).unit
    x = data.series[:, 0] if data.mask is None else data.series[:, 0][data.mask]
    assert unit == pytest.approx(float((x[x > 0.5] - 0.5).mean()), rel=1e-5)


def test_control_vectors_of_steering_are_as_long_as_the_latents_own():
    model, dictionary = linear_model()
    with torch.no_grad():
        dictionary.W_dec[1] *= 7
    data = made.labelled(n=6)
    found = steer_latent(model, dictionary, data, 0, doses=(2,), unit=1.0, n_controls=5)
    assert found.control_latents == (1,)
    logits = found.control_change("logit")[0, 0].float()
    expected = (2 * model.W_U[1]).detach().expand(6, -1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_probabilities_and_their_intervals_are_those_of_scipy():
    from scipy.stats import t

    model, data = made.per_step(n_layers=2), made.labelled()
    dictionary = made.random_dictionary(8, 10, "blocks.0.hook_mlp_out")
    result = ablate_latent(model, dictionary, data, 2, doses=(1.0, 2.0), n_controls=3)
    frame = result.to_dataframe()
    change = result.output.double().softmax(-1) - result.baseline.double().softmax(-1)
    one = frame[(frame.dose == 2.0) & (frame["class"] == "class 1")].iloc[0]
    values = change[1, :, 1].numpy()
    assert one.change == pytest.approx(values.mean())
    low, high = t.interval(
        0.95, len(values) - 1, values.mean(), values.std(ddof=1) / len(values) ** 0.5
    )
    assert (one.low, one.high) == (pytest.approx(low), pytest.approx(high))
    control = result.controls.double().softmax(-1) - result.baseline.double().softmax(-1)
    means = control[:, 1, :, 1].mean(1)
    assert (one.control_low, one.control_high) == (
        pytest.approx(float(means.min())),
        pytest.approx(float(means.max())),
    )
    assert one.beyond_controls == pytest.approx(
        float((means.abs() < abs(one.change)).float().mean())
    )


def test_controls_are_active_where_the_latent_is():
    model, data = made.per_step(n_layers=1), made.labelled()
    dictionary = made.random_dictionary(8, 30, "hook_embed", threshold=0.8)
    result = ablate_latent(model, dictionary, data, 3, n_controls=4, seed=1)
    _, cache = model.run_with_cache(data.series, names_filter="hook_embed")
    active = dictionary.encode(cache["hook_embed"]).amax(1)[result.series] > 0
    assert 3 not in result.control_latents and len(result.control_latents) == 4
    assert (active[:, list(result.control_latents)].float().mean(0) > 0).all()
    again = ablate_latent(model, dictionary, data, 3, n_controls=4, seed=1)
    assert again.control_latents == result.control_latents
    torch.testing.assert_close(again.controls, result.controls)


def test_directions_are_the_decoders_rows_as_decoding_one_latent_gives_them():
    sae = real_sae("topk", "blocks.0.hook_mlp_out", 8, rescale_acts_by_decoder_norm=True)
    expected = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions(sae, chunk=5), expected.detach(), atol=1e-6, rtol=1e-5)
    normed = real_sae("standard", "blocks.0.hook_mlp_out", 8, normalize_activations="layer_norm")
    torch.testing.assert_close(directions(normed), normed.W_dec.detach(), atol=1e-6, rtol=1e-5)
    normed(torch.randn(2, 3, 8))  # still works: its functions were not touched


def test_errors_of_interventions(no_shape_checks):
    model, dictionary = linear_model()
    data = made.labelled(n=6)
    with torch.no_grad():
        dictionary.W_enc[:, 1] = 0
    with pytest.raises(ArgumentError, match="latent 1 is never active on these 6 series"):
        ablate_latent(model, dictionary, data, 1)
    steer_latent(model, dictionary, data, 1, unit=1.0)  # with a unit it can be steered
    for bad, words in ((2, r"a latent in 0..1, got 2"), (1.5, "as an integer, got 1.5")):
        with pytest.raises(ArgumentError, match=words):
            ablate_latent(model, dictionary, data, bad)
    with pytest.raises(ArgumentError, match="at least one finite dose, got"):
        steer_latent(model, dictionary, data, 0, doses=())
    with pytest.raises(ArgumentError, match="n_controls as an integer of at least 0"):
        ablate_latent(model, dictionary, data, 0, n_controls=-1)
    with pytest.raises(ArgumentError, match="expected a measure of"):
        ablate_latent(model, dictionary, data, 0).change("forecast")
    with pytest.raises(ArgumentError, match="n_series of at least 1, got 0"):
        output_effects(model, dictionary, data, n_series=0)
