"""A fit that diverges says so, and nothing that is not finite is handed back or kept."""

from __future__ import annotations

import copy

import pytest
import torch

from tstlens import codebooks, saes, truth
from tstlens.errors import ArgumentError
from tstlens.training import train
from tstlens.truth.regime import RegimeMachine
from tstlens.truth.training import fit_next_patch

HOOK = "blocks.0.hook_mlp_out"
FITS = {
    "train": lambda m, data: train(m, data, epochs=3, lr=1e30, clip_norm=None, progress=False),
    "codebooks.fit": lambda m, data: codebooks.fit(
        m, data, [HOOK], n_codes=6, epochs=3, codebook_lr=1e30, progress=False
    ),
    "codebooks.fit, together": lambda m, data: codebooks.fit(
        m, data, [HOOK], n_codes=6, epochs=3, train_model=True, lr=1e30, progress=False
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_the_model_keeps_its_last_finite_weights(name, make_model, full):
    model = make_model()
    with pytest.raises(ArgumentError, match=r"lr: .*(loss|weights|logits).* finite.*put back"):
        FITS[name](model, full)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert model(full.series).isfinite().all() and not model.acts_to_codebooks


def test_next_patch_training_keeps_them_too():
    machine = RegimeMachine(n_states=12, n_edges=2, n_prototypes=4, patch_len=4)
    model = truth.regime_model(machine, n_pos=4, n_layers=1, d_model=8, n_heads=2, d_mlp=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="lr: .* no longer finite at"):
        fit_next_patch(model, machine, n_pos=4, steps=5, batch_size=4, lr=1e30, progress=False)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, before[key])


@pytest.mark.parametrize("sae", ["topk", "standard", "gated", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("lr", [1e6, 1e30])
def test_an_sae_that_diverges_is_not_handed_back(sae, lr, tmp_path):
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    options = {"d_sae": 16, "steps": 120, "batch_size": 32, "lr": lr, "progress": False}
    try:
        found = saes.fit(rows, sae, checkpoint=tmp_path, checkpoint_every=5, **options)
    except ArgumentError as error:
        assert "lr: the SAE is no longer finite at step" in str(error)
    else:  # huge, but numbers
        assert lr == 1e6 and found(rows).isfinite().all()
    for part in tmp_path.rglob("*.safetensors"):
        from safetensors.torch import load_file

        assert all(weight.isfinite().all() for weight in load_file(part).values())
