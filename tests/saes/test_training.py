"""Training: what sae-lens reads back, resuming, planted features."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
from sae_lens.synthetic import ActivationGenerator, FeatureDictionary
from sae_lens.training.sae_trainer import SAETrainer

from tstlens import codebooks, saes
from tstlens.errors import ArgumentError, CorruptFileError, StorageError, UnknownNameError
from tstlens.truth import recovery

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
QUICK = {"d_sae": 16, "steps": 30, "batch_size": 64, "progress": False}


def activations(model, data, hook):
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=[hook])
    return cache[hook] if data.mask is None else cache[hook][data.mask]


@pytest.fixture(scope="module")
def trained(make_model, data, tmp_path_factory):
    """An SAE of every architecture, saved; by architecture, with its folder."""
    model, found = make_model(), {}
    for name in saes.architectures():
        out = {"hook_out": "blocks.0.hook_mlp_out"} if "transcoder" in name else {}
        hook = "blocks.0.hook_resid_mid" if out else MLP_OUT
        sae = saes.train(model, data, hook, name, **out, **QUICK)
        folder = tmp_path_factory.mktemp(name)
        sae.save_model(folder)
        found[name] = sae, folder
    return found


def test_every_architecture_of_the_issue_can_be_trained():
    wanted = {"standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"}
    wanted |= {"matching_pursuit", "transcoder", "skip_transcoder"}
    assert wanted <= set(saes.architectures())


def test_saes_load_in_a_process_that_never_sees_tstlens_and_give_the_same_latents(
    trained, tmp_path
):
    x = torch.randn(50, 8)
    expected = {name: sae.encode(x).detach() for name, (sae, _) in trained.items()}
    folders = {name: str(folder) for name, (_, folder) in trained.items()}
    torch.save({"x": x, "folders": folders}, tmp_path / "in.pt")
    code = textwrap.dedent(f"""
        import sys, torch, sae_lens
        given = torch.load(r"{tmp_path / "in.pt"}", weights_only=True)
        latents = {{}}
        for name, folder in given["folders"].items():
            sae = sae_lens.SAE.load_from_disk(folder)
            latents[name] = sae.encode(given["x"]).detach()
        assert not any(name.split(".")[0] == "tstlens" for name in sys.modules)
        torch.save(latents, r"{tmp_path / "out.pt"}")
    """)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    latents = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in expected:
        assert torch.equal(latents[name], expected[name]), name


def test_training_lowers_the_error_and_saes_take_activations_as_they_are(make_model, data, trained):
    """The scale of the input is folded in: untouched activations come out near where they went."""
    model = make_model()
    x = activations(model, data, MLP_OUT)
    sae = saes.train(
        model, data, MLP_OUT, d_sae=32, k=4, steps=600, batch_size=128, lr=3e-3, progress=False
    )
    spread = (x - x.mean(0)).pow(2).sum()
    explained = 1 - (x - sae(x)).pow(2).sum() / spread
    assert explained > 0.8
    assert (sae.encode(x) != 0).sum(-1).max() <= 4


@pytest.mark.parametrize(
    ("sae", "normalize"),
    [("topk", "none"), ("topk", "covariance_whitening"), ("standard", "layer_norm")],
)
def test_other_normalisations(model, data, sae, normalize):
    options = {**QUICK, "steps": 400, "lr": 3e-3}
    options |= {"k": 4} if sae == "topk" else {"l1_coefficient": 0.01}
    sae = saes.train(model, data, MLP_OUT, sae, normalize=normalize, **options)
    x = activations(model, data, MLP_OUT)
    assert (x - sae(x)).pow(2).sum() < 0.5 * (x - x.mean(0)).pow(2).sum()


def test_the_mean_is_where_the_decoder_bias_starts(model, data):
    sae = saes.train(model, data, MLP_OUT, d_sae=16, steps=1, batch_size=344, progress=False)
    x = activations(model, data, MLP_OUT)
    assert (sae.b_dec - x.mean(0)).abs().max() < 0.05 * x.std()


def test_the_same_seed_gives_the_same_sae_and_leaves_the_random_state_alone(model, data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = saes.train(model, data, MLP_OUT, seed=1, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    second, other = (saes.train(model, data, MLP_OUT, seed=seed, **QUICK) for seed in (1, 2))
    assert torch.equal(first.W_dec, second.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)


def test_metadata_say_where_it_comes_from(model, data):
    metadata = saes.train(model, data, MLP_OUT, seed=3, **QUICK).cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == ("small", MLP_OUT)
    assert (metadata.dataset_path, metadata.dataset_split, metadata.seed) == ("toy", "train", 3)
    assert metadata.n_series == 40


@pytest.mark.parametrize("head", ["joined", "each", 1])
def test_heads(model, full, head):
    sae = saes.train(model, full, Z, head=head, **QUICK)
    assert sae.cfg.d_in == (8 if head == "joined" else 4)
    before = model(full.series)
    whole = model.run_with_saes(full.series, saes=sae, use_error_term=True)
    torch.testing.assert_close(whole, before, atol=1e-5, rtol=0)
    _, cache = model.run_with_cache_with_saes(full.series, saes=sae)
    assert cache[f"{Z}.hook_sae_output"].shape[-1] == 4


def test_a_config_of_sae_lens_is_taken_as_it_is(model, data):
    cfg = TopKTrainingSAEConfig(d_in=8, d_sae=20, k=3, aux_loss_coefficient=0.5)
    sae = saes.train(model, data, MLP_OUT, cfg, steps=10, batch_size=64, progress=False)
    assert (sae.cfg.d_sae, sae.cfg.k) == (20, 3)


def test_an_interrupted_training_ends_as_if_it_had_not_been(model, data, tmp_path, monkeypatch):
    options = {**QUICK, "checkpoint_every": 10}
    whole = saes.train(model, data, MLP_OUT, **options)
    draw, drawn = saes.ActivationStream.__next__, []

    def interrupted(stream):
        drawn.append(1)
        if len(drawn) == 16 + 25:  # 16 batches tell the scale
            raise KeyboardInterrupt
        return draw(stream)

    monkeypatch.setattr(saes.ActivationStream, "__next__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saes.train(model, data, MLP_OUT, checkpoint=tmp_path, **options)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000020"]
    drawn[:] = [1] * 1000
    resumed = saes.train(model, data, MLP_OUT, checkpoint=tmp_path, **options)
    assert len(drawn) == 1010
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    again = saes.train(model, data, MLP_OUT, checkpoint=tmp_path, **options)  # loads the result
    assert len(drawn) == 1010 and torch.equal(again.W_dec, whole.W_dec)


@pytest.mark.slow
def test_a_training_killed_while_it_writes_keeps_the_checkpoint_before(tmp_path, repository):
    code = textwrap.dedent(f"""
        import os, signal, sys, torch
        torch.set_num_threads(1)
        from tstlens import saes
        from tstlens.saes import training as training_folder
        put, n = training_folder.TrainingFolder._put, []
        def killed(self, *args):
            n.append(1)
            if len(n) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            put(self, *args)
        training_folder.TrainingFolder._put = killed
        x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
        sae = saes.fit(x, d_sae=16, k=2, steps=40, batch_size=32, checkpoint_every=10,
            checkpoint=r"{tmp_path / "run"}", progress=False)
        sae.save_model(r"{tmp_path / "sae"}")
    """)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", code]
    first = subprocess.run([*command, "3"], env=environment, capture_output=True)
    assert first.returncode == -signal.SIGKILL
    latest = json.loads((tmp_path / "run" / "latest.json").read_text())
    assert latest["name"] == "step-00000020"
    subprocess.run([*command, "1000"], env=environment, check=True, capture_output=True)
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    whole = saes.fit(x, d_sae=16, k=2, steps=40, batch_size=32, progress=False)
    assert torch.equal(SAE.load_from_disk(tmp_path / "sae").W_dec, whole.W_dec)


def test_a_damaged_or_foreign_checkpoint_is_refused(model, data, tmp_path):
    saes.train(model, data, MLP_OUT, checkpoint=tmp_path, **QUICK)
    x = activations(model, data, MLP_OUT)
    saes.fit(x, checkpoint=tmp_path / "fit", **QUICK)
    with pytest.raises(StorageError, match=r"other settings \(different: seed\)"):
        saes.fit(x, checkpoint=tmp_path / "fit", seed=1, **QUICK)
    with pytest.raises(StorageError, match=r"other settings \(different: source\)"):
        saes.train(model, data[:30], MLP_OUT, checkpoint=tmp_path, **QUICK)
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CorruptFileError, match=r"sae_weights.safetensors is truncated"):
        saes.train(model, data, MLP_OUT, checkpoint=tmp_path, **QUICK)


def test_any_source_of_activations_can_be_trained_on(model, data):
    x = activations(model, data, MLP_OUT)
    from_tensor = saes.fit(x, k=2, seed=4, **QUICK)
    from_iterator = saes.fit(saes.TensorStream(x, 64, seed=4), d_in=8, k=2, seed=4, **QUICK)
    assert torch.equal(from_tensor.W_dec, from_iterator.W_dec)


def test_transcoders_predict_one_activation_from_another(trained, make_model, data):
    model = make_model()
    x = activations(model, data, "blocks.0.hook_resid_mid")
    y = activations(model, data, MLP_OUT)
    options = {"d_sae": 64, "steps": 800, "batch_size": 128, "lr": 3e-3, "progress": False}
    transcoder = saes.train(
        model,
        data,
        "blocks.0.hook_resid_mid",
        "transcoder",
        hook_out=MLP_OUT,
        l1_coefficient=0.01,
        **options,
    )
    assert (y - transcoder(x)).pow(2).sum() < 0.2 * (y - y.mean(0)).pow(2).sum()
    assert transcoder.cfg.metadata.hook_name_out == MLP_OUT


@pytest.mark.slow
def test_planted_features_are_found(capsys):
    """128 sparse features in 64 dimensions: mean correlation coefficient at least 0.9."""
    torch.manual_seed(11)
    planted = FeatureDictionary(num_features=128, hidden_dim=64)
    generator = ActivationGenerator(128, torch.full((128,), 0.03))
    truth = generator.sample(60_000)
    x = planted(truth).detach()
    sae = saes.fit(x, d_sae=128, k=4, steps=2000, batch_size=512, normalize="none", progress=False)
    features = planted.feature_vectors.detach()
    found = recovery(sae, features, x[:5000], truth[:5000])
    with capsys.disabled():
        print(
            f"\nplanted features: mean correlation coefficient {found.mcc:.3f} (random directions "
            f"{found.random_mcc:.3f}), uniqueness {found.uniqueness:.3f}, F1 {found.f1:.3f}"
        )
    assert found.mcc >= 0.9 > found.random_mcc + 0.4
    exact = recovery(_with_decoder(sae, features), features)
    assert exact.mcc == pytest.approx(1.0) and exact.uniqueness == 1.0


def _with_decoder(sae, directions):
    with torch.no_grad():
        sae.W_dec.copy_(directions)
    return sae


def test_errors_say_what_is_wrong(model, data):
    with pytest.raises(UnknownNameError, match="did you mean 'topk'"):
        saes.train(model, data, MLP_OUT, "top_k", **QUICK)
    with pytest.raises(ArgumentError, match="'standard' has no k; .* l1_coefficient="):
        saes.train(model, data, MLP_OUT, "standard", k=4, **QUICK)
    with pytest.raises(ArgumentError, match=r"k in 1\.\.16 \(d_sae\), got 17"):
        saes.train(model, data, MLP_OUT, k=17, **QUICK)
    with pytest.raises(ArgumentError, match="'topk' has no option 'l1'"):
        saes.train(model, data, MLP_OUT, l1=2.0, **QUICK)
    with pytest.raises(ArgumentError, match="d_in=8, got d_in=9"):
        saes.train(model, data, MLP_OUT, TopKTrainingSAEConfig(d_in=9, d_sae=20), steps=1)
    with pytest.raises(ArgumentError, match="leave them out"):
        saes.train(model, data, MLP_OUT, TopKTrainingSAEConfig(d_in=8, d_sae=20), k=2)
    with pytest.raises(ArgumentError, match="cannot revive dead latents of 'topk'"):
        saes.train(model, data, MLP_OUT, normalize="layer_norm", **QUICK)
    with pytest.raises(ArgumentError, match="steps as an integer of at least 1"):
        saes.train(model, data, MLP_OUT, steps=0)
    with pytest.raises(ArgumentError, match="give hook_out="):
        saes.train(model, data, MLP_OUT, "transcoder", **QUICK)
    with pytest.raises(ArgumentError, match="give d_in="):
        saes.fit(iter([]), **QUICK)
    with pytest.raises(ArgumentError, match="nothing to train on"):
        saes.fit(torch.zeros(100, 8), **QUICK)


def theirs(**changes):
    own = {"total_training_samples": 30 * 64, "train_batch_size_samples": 64, "lr": 2e-3}
    return SAETrainerConfig(**{**own, **changes})


SCHEDULE = {
    "adam_beta1": 0.5,
    "adam_beta2": 0.99,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 5,
    "lr_decay_steps": 7,
    "lr_end": 1e-5,
    "dead_feature_window": 10,
    "feature_sampling_window": 15,
}


@pytest.mark.parametrize("given", ["keywords", "config", "trainer"])
def test_trainer_options_do_what_the_trainer_of_sae_lens_does(given):
    """As its ``SAETrainer.fit`` with the same weights and rows."""
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(3))
    ours = {"steps": 30, "batch_size": 64, "lr": 2e-3, "k": 2, "normalize": "none"}
    made = {
        "keywords": lambda: saes.fit(rows, progress=False, **ours, **SCHEDULE),
        "config": lambda: saes.fit(
            rows, config=saes.TrainConfig(**ours, options=SCHEDULE, progress=False)
        ),
        "trainer": lambda: saes.fit(
            rows, k=2, normalize="none", trainer=theirs(**SCHEDULE), progress=False
        ),
    }[given]()
    torch.manual_seed(0)
    sae = get_sae_training_class("topk")[0](saes.training_config("topk", 8, k=2, normalize="none"))
    stream = saes.TensorStream(rows, 64, 0)
    first = torch.cat([next(stream) for _ in range(16)])  # the decoder's bias starts at their mean
    sae.b_dec.data.copy_(first.mean(0))
    expected = SAETrainer(theirs(**SCHEDULE), sae, stream).fit().eval()
    torch.testing.assert_close(made(rows), expected(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warm_upsteps": 3}, "did you mean 'lr_warm_up_steps'"),
        ({"zz_warm_up_steps": 3}, "no option 'zz_warm_up_steps'; it has"),
        ({"lr_scheduler_name": "cosine"}, "sae-lens refuses these trainer options"),
        ({"n_checkpoints": 2}, "n_checkpoints: give checkpoint="),
        ({"trainer": theirs(), "steps": 7}, "trainer= says steps itself"),
        ({"trainer": theirs(), "adam_beta1": 0.5}, "trainer= says adam_beta1 itself"),
    ],
)
def test_trainer_options_that_are_not_possible_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        saes.fit(torch.randn(80, 8), progress=False, **options)


def test_checkpoints_of_sae_lens_are_kept_as_often_as_it_keeps_them(tmp_path):
    quick = {"steps": 30, "batch_size": 64, "k": 2, "progress": False}
    saes.fit(torch.randn(80, 8), checkpoint=tmp_path, n_checkpoints=2, **quick)
    kept = sorted(int(one.name) for one in (tmp_path / "kept").iterdir())
    assert kept == [64 * 11, 64 * 21]
    assert (tmp_path / "kept" / "704" / "sae_weights.safetensors").is_file()


def test_dictionaries_remember_how_the_weights_were_processed(data, make_model, tmp_path):
    """Trained, saved and loaded; said on a model whose weights are otherwise, and only there."""
    model = make_model(norm_position="pre")
    plain = copy.deepcopy(model)
    model.process_weights_(center_writing_weights=False)
    quick = {"d_sae": 16, "k": 3, "steps": 5, "batch_size": 32, "progress": False}
    sae = saes.train(model, data, "blocks.0.hook_mlp_out", **quick)
    loaded = saes.load(saes.save(sae, tmp_path / "sae"))
    assert loaded.cfg.metadata.processing == ["fold_ln", "fold_value_biases"]
    sizes = {"n_codes": 6, "k": 2, "epochs": 1, "batch_size": 20, "progress": False}
    (book,) = codebooks.fit(model, data, ["blocks.0.hook_mlp_out"], **sizes).values()
    model.reset_saes()
    book.save_model(tmp_path / "book")
    for dictionary in (loaded, saes.load(tmp_path / "book")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.add_sae(dictionary)
        model.reset_saes()
        with pytest.warns(UserWarning, match="this model's are as they were"):
            plain.add_sae(dictionary)
        plain.reset_saes()
    own = saes.train(plain, data, "blocks.0.hook_mlp_out", **quick)
    assert own.cfg.metadata.processing == []
    with pytest.warns(UserWarning, match="trained on weights as they were"):
        model.add_sae(own)
