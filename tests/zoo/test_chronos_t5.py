"""A converted Chronos-T5 gives its source's logits, token by token."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tstlens
from tests.zoo.claims import (
    dead_hooks,
    mean_entropy,
    scrambled,
    splicing_changes_then_restores,
    sweep_error,
)
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    SeriesShapeError,
    StateDictError,
    UnknownFamilyError,
    UnsupportedSourceError,
)
from tstlens.model import HookedTST
from tstlens.zoo.chronos_t5 import load, reads, run, with_decoder_steps
from tstlens.zoo.comparing import compare

chronos = pytest.importorskip("chronos.chronos")

OWN = {
    "tokenizer_class": "MeanScaleUniformBins",
    "tokenizer_kwargs": {"low_limit": -3.0, "high_limit": 3.0},
    "context_length": 48,
    "prediction_length": 5,
    "n_tokens": 40,
    "n_special_tokens": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "use_eos_token": True,
    "model_type": "seq2seq",
    "num_samples": 3,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "tie_word_embeddings": True,
}
GRID: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {}),
    (6, {}),
    (3, {"tie_word_embeddings": False}),
    (0, {"use_eos_token": False}),
    (2, {"use_eos_token": False, "context_length": 11}),
    (4, {"feed_forward_proj": "gated-gelu"}),
    (4, {"feed_forward_proj": "gated-silu", "num_heads": 1}),
    (12, {"relative_attention_max_distance": 6, "relative_attention_num_buckets": 4}),
    (2, {"num_layers": 1, "num_decoder_layers": 3}),
    (2, {"num_layers": 3, "num_decoder_layers": 1, "d_kv": 16}),
    (3, {"n_tokens": 12, "vocab_size": 12, "n_special_tokens": 5, "eos_token_id": 3}),
    (3, {"tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0}, "pad_token_id": 1}),
]


def config(**options: Any) -> Any:
    from transformers import T5Config

    t5 = {name: options.get(name, value) for name, value in T5.items()}
    own = {name: options.get(name, value) for name, value in OWN.items()}
    return T5Config(**t5, chronos_config=own)


def make(**options: Any) -> Any:
    from transformers import T5ForConditionalGeneration

    made = config(**options)
    torch.manual_seed(0)
    inner = T5ForConditionalGeneration(made)
    return scrambled(chronos.ChronosModel(chronos.ChronosConfig(**made.chronos_config), inner), 0.3)


def series(n_time: int = 30, n_channels: int = 2, batch: int = 3) -> torch.Tensor:
    walk = torch.randn(batch, n_channels, n_time).cumsum(-1)
    return walk * torch.tensor([0.1, 30.0])[:n_channels, None]


@pytest.fixture(scope="module")
def source() -> Any:
    return make()


@pytest.fixture(scope="module")
def model(source) -> HookedTST:
    return tstlens.convert(source, n_channels=2, decoder_steps=4)


@pytest.fixture(scope="module")
def double() -> HookedTST:
    return tstlens.convert(make().double(), n_channels=2, decoder_steps=4)


@pytest.mark.parametrize(("steps", "options"), GRID, ids=str)
def test_logits_and_activations_equal_the_source(steps, options):
    source = make(**options)
    model = tstlens.convert(source, n_channels=2, decoder_steps=steps)
    assert model.parity.max_rel <= 1e-5 and model.parity.max_rel_float64 <= 1e-9
    torch.manual_seed(1)
    x = series(min(30, model.cfg.embed.context_length + steps))
    x[0, 0, 5:9], x[1, :, :3] = torch.nan, torch.nan
    comparison = compare(source, model, x)
    assert comparison.passed, comparison
    assert model(x).shape == (3, 2, steps + 1, options.get("n_tokens", 40))
    _, cache = model.run_with_cache(x)
    assert mean_entropy(cache["pattern", 0]) < 0.9
    assert cache["pattern", -1].shape[-2:] == (steps + 1, steps + 1)


def test_sampling_stays_with_the_source_and_starts_from_our_distribution(source):
    model = tstlens.convert(source)
    context = torch.randn(1, 1, 20)
    pipeline = chronos.ChronosPipeline(source.config.create_tokenizer(), source)
    torch.manual_seed(0)
    drawn = pipeline.predict(
        context[0], prediction_length=1, num_samples=4000, top_k=0, limit_prediction_length=True
    )
    _, cache = model.run_with_cache(context)
    scale = cache["embed.hook_scale"][0]
    values = model.embed.values(torch.arange(40), scale[0])
    expected = (model(context)[0, 0, 0].softmax(-1) * values).sum()
    error = drawn.std() / 4000**0.5
    assert abs(float(drawn.mean() - expected)) < 5 * float(error)


def test_a_later_step_does_not_reach_an_earlier_one(model):
    x, changed = series(), series()
    changed[..., :-1] = x[..., :-1]
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert not torch.allclose(before[:, :, -1], after[:, :, -1])


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    n_channels=st.integers(1, 3),
    n_time=st.integers(1, 40),
    steps=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_any_shape_and_missing_values(source, model, batch, n_channels, n_time, steps, seed):
    model = copy.deepcopy(model)
    model.cfg.n_channels = n_channels
    assert with_decoder_steps(model, steps) is model
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n_channels, n_time + steps, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.2] = torch.nan
    x[-1] = 0.0
    expected = run(source, x, None, steps).detach()
    atol = 1e-5 * float(expected.abs().max())
    assert torch.allclose(model(x), expected, rtol=0, atol=atol)
    mask = ~x.isnan().any(1)
    filled = x.nan_to_num(7.0)
    marked = filled.masked_fill(~mask[:, None], torch.nan)
    assert torch.equal(model(filled, mask=mask), model(marked)) if mask.any(1).all() else True


def test_every_hook_after_the_bins_is_live(double):
    binned = ("hook_series", "embed.hook_scale", "embed.hook_scaled")
    assert dead_hooks(double, series().double(), allowed=binned) == []


def test_gradients_end_at_the_bins_but_edits_do_not(double):
    x = series().double()
    clean = double(x)
    for name in ("hook_series", "embed.hook_scale", "embed.hook_scaled"):
        moved = double.run_with_hooks(x, fwd_hooks=[(name, lambda act, hook: 3 * act + 1)])
        assert not torch.allclose(moved, clean), name
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        given = x.clone().requires_grad_()
        torch.autograd.grad(double(given).sum(), given)


@pytest.mark.parametrize(
    ("site", "axes", "entries"),
    [
        ("z", ("layer", "head"), [(0, 2), (1, 0), (2, 1), (3, 2)]),
        ("encoder_resid_pre", ("layer", "channel", "pos"), [(0, 1, 2), (1, 0, 25)]),
        ("decoder_resid_post", ("layer", "pos"), [(2, 4), (3, 0)]),
        ("decoder_pattern", ("layer", "head", "query"), [(2, 0, 4), (3, 1, 2)]),
        ("decoder_mlp_post", ("layer", "pos"), [(2, 1), (3, 4)]),
        ("cross_pattern", ("layer", "query", "key"), [(2, 1, 4), (3, 4, 20)]),
        ("decoder_embed", ("pos",), [(0,), (4,)]),
        ("series", ("time",), [(3,), (28,)]),
    ],
)
def test_sweeps_equal_the_serial_loop(double, site, axes, entries):
    clean, corrupted = series().double(), series().flip(0).double()

    def last_step(out: torch.Tensor) -> torch.Tensor:
        return out[:, :, -1].softmax(-1)[..., 5:12].sum((1, 2))

    assert sweep_error(double, clean, corrupted, site, axes, last_step, entries) <= 1e-10


def test_attribution_along_a_path_is_the_sweep_of_whole_layers(double):
    clean = series().double()
    corrupted = clean.roll(1, 0)

    def one_token(out: torch.Tensor) -> torch.Tensor:
        return out[:, :, -1, 7].sum(1)

    given = (double, clean, corrupted, "decoder_resid_pre", ("layer",), one_token)
    exact = torch.as_tensor(patching.sweep(*given, progress=False).effect())
    found = torch.as_tensor(patching.attribution(*given, steps=300, progress=False).effect())
    assert torch.allclose(found, exact, atol=0.02 * float(exact.abs().max()))


def test_saved_and_loaded_it_computes_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedTST.from_pretrained(tmp_path / "saved")
    x = series()
    assert torch.equal(loaded(x), model(x)) and loaded.cfg == model.cfg


@pytest.mark.saes
def test_a_dictionary_comes_out_without_a_trace(model):
    assert splicing_changes_then_restores(model, series(), "decoder.1.hook_mlp_out") == (True, True)


def test_positions_are_samples(model):
    assert model.n_pos(30) == 27 and model.time_span(3, n_time=30) == slice(3, 4)
    assert model.time_cell(-1, n_time=30) == slice(0, 0)  # the end token
    with pytest.raises(SeriesShapeError, match=r"at most context_length=48.*4 that the decoder"):
        model(series(60))
    with pytest.raises(ArgumentError, match="takes samples in its decoder"):
        with_decoder_steps(SimpleNamespace(cfg=SimpleNamespace(embed=None)), 3)


def test_weights_and_a_folder_convert_too(source, model, tmp_path):
    entries = source.model.config.to_dict()
    assert reads(entries) and not reads({})
    x = series()
    for state in (source.state_dict(), source.model.state_dict()):
        again = tstlens.convert(
            state, family="chronos-t5", config=entries, n_channels=2, decoder_steps=4
        )
        assert torch.equal(again(x), model(x))
    source.model.save_pretrained(tmp_path / "t5")
    loaded = tstlens.convert(load(tmp_path / "t5"), n_channels=2, decoder_steps=4)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ArgumentError, match="give config="):
        tstlens.convert(source.state_dict(), family="chronos-t5")
    half = {k: v for k, v in source.state_dict().items() if "decoder.block.1" not in k}
    with pytest.raises(StateDictError, match=r"missing \(decoder.block.1"):
        tstlens.convert(half, family="chronos-t5", config=entries)


def test_near_misses_are_refused(source):
    class Mine(chronos.ChronosModel):
        pass

    with pytest.raises(UnknownFamilyError, match="Mine"):
        tstlens.convert(Mine(source.config, source.model))
    for name, value in (("model_type", "causal"), ("tokenizer_class", "MyTokenizer")):
        changed = copy.deepcopy(source)
        setattr(changed.config, name, value)
        with pytest.raises(UnsupportedSourceError, match=value):
            tstlens.convert(changed)
    with pytest.raises(UnsupportedSourceError, match="n_tokens=40, but the model embeds 50"):
        tstlens.convert(make(vocab_size=50))
    changed = copy.deepcopy(source)
    changed.model.forward = changed.model.forward
    with pytest.raises(UnsupportedSourceError, match="are not covered"):
        tstlens.convert(changed)
