"""``compare`` names the activation from which on two models part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tstlens
from tstlens.errors import ArgumentError, UnknownFamilyError, UnsupportedSourceError
from tstlens.training import ConvTST
from tstlens.zoo.comparing import compare
from tstlens.zoo.torch_encoder import WholeEncoder


@pytest.fixture
def source() -> ConvTST:
    torch.manual_seed(0)
    return ConvTST(
        n_channels=2,
        n_time=12,
        n_classes=3,
        conv_channels=(8, 8),
        kernel_sizes=(3, 3),
        strides=(1, 1),
        d_mlp=16,
    )


@pytest.fixture
def series() -> torch.Tensor:
    return torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(1))


def test_a_converted_model_agrees_at_every_activation(source, series):
    found = compare(source, tstlens.convert(source), series)
    assert found.passed and found.first_difference is None
    frame = found.to_dataframe()
    assert frame.hook_name.tolist()[0] == "embed.stages.0.hook_pre"
    assert frame.hook_name.tolist()[-1] == "output"
    assert len(frame) == 2 + 6 * 3 + 1 and (frame.max_rel <= 1e-5).all()


@pytest.mark.parametrize(
    ("parameter", "first"),
    [
        ("embed.stages.1.conv.weight", "embed.stages.1.hook_pre"),
        ("pos_embed.W_pos", "blocks.0.hook_resid_pre"),
        ("blocks.1.attn.W_Q", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.W_in", "blocks.1.mlp.hook_pre"),
        ("blocks.2.mlp.b_out", "blocks.2.hook_mlp_out"),
        ("blocks.0.ln2.w", "blocks.0.hook_normalized_resid_post"),
        ("head.W_U", "output"),
    ],
)
def test_a_changed_weight_is_found_where_it_acts(source, series, parameter, first):
    model = tstlens.convert(source)
    with torch.no_grad():
        model.get_parameter(parameter).mul_(1.5).add_(0.1)
    found = compare(source, model, series)
    assert found.first_difference is not None and found.first_difference.hook_name == first
    assert f"the first activation that differs from ConvTST is {first}" in str(found)


def test_masks_are_passed_on_and_modes_come_back(source, series):
    source.train()
    source.conv1.eval()
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[1, 7:] = False
    assert compare(source, tstlens.convert(source), series, mask).passed
    assert source.training and source.bn1.training and not source.conv1.training


def test_an_encoder_is_compared_with_its_front_end_and_head(series):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    class Steps(nn.Conv1d):
        def forward(self, series):
            return super().forward(series).transpose(1, 2)

    head = nn.Sequential(nn.Flatten(), nn.Linear(96, 3))
    whole = WholeEncoder(encoder, Steps(2, 8, 1), head)
    model = tstlens.convert(whole, example=series)
    assert compare(whole, model, series).passed
    with pytest.raises(ArgumentError, match="a bare TransformerEncoder takes no series"):
        compare(encoder, model, series)


def test_what_cannot_be_compared_is_said(source, series):
    model = tstlens.convert(source)
    with pytest.raises(UnsupportedSourceError, match="is not a 'conv-tst' model"):
        compare(nn.Linear(2, 2), model, series)
    model.info = {}
    with pytest.raises(UnknownFamilyError, match="The model's info does not tell its source"):
        compare(source, model, series)
