"""One way through the data, against the model called on one series at a time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.probing.made import labelled, small
from tstlens.errors import ArgumentError, HookError, UnknownHookError
from tstlens.metrics import Metric, of_class
from tstlens.model import HookedTST, HookedTSTConfig
from tstlens.run import Runs, evaluating
from tstlens.zoo.lagged_steps import LaggedStepsConfig, StepParametersConfig

HOOKS = ["hook_embed", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out"]
KINDS = {
    "plain": {},
    "per channel": {"per_channel": True},
    "post-norm": {"norm_position": "post"},
    "scores handed on": {"residual_attention": True},
}


def halved(activation, hook):
    return activation / 2


def one_by_one(model, data, hooks=(), edits=()):
    """The oracle: outputs and activations of single series, cut where they are padded."""
    outputs, acts = [], {name: [] for name in hooks}
    for row in range(len(data)):
        series = data.series[row : row + 1].to(model.cfg.dtype)
        mask = None if data.mask is None else data.mask[row : row + 1]
        with torch.no_grad(), model.hooks(fwd_hooks=list(edits)):
            output, cache = model.run_with_cache(series, mask=mask)
        outputs.append(output)
        for name in hooks:
            acts[name].append(cache[name])
    return torch.cat(outputs), {name: torch.cat(found) for name, found in acts.items()}


CASES = list(product(KINDS, (False, True), (torch.float32, torch.float64)))


@pytest.mark.parametrize(("kind", "padded", "dtype"), CASES)
def test_every_way_through_the_data_gives_what_single_series_give(kind, padded, dtype):
    model, data = small(**KINDS[kind]).to(dtype), labelled(6, padded=padded)
    expected, acts = one_by_one(model, data, HOOKS)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for size, training in product((1, 4, 64), (False, True)):
        if training:  # some modules only: each gets its own flag back
            model.head.train()
            model.blocks[1].train()
        flags = [part.training for part in model.modules()]
        found = Runs(model, data, batch_size=size).outputs()
        torch.testing.assert_close(found, expected, **close)
        passes = list(Runs(model, data, hooks=HOOKS, batch_size=size).passes())
        assert [len(one) for one in passes] == {1: [1] * 6, 4: [4, 2], 64: [6]}[size]
        assert all(one.output is None for one in passes)
        for name in HOOKS:
            found = torch.cat([one.acts[name] for one in passes])
            torch.testing.assert_close(found, acts[name], **close)
        assert [part.training for part in model.modules()] == flags
        assert not found.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_the_start_is_run_once(kind):
    model, data = small(**KINDS[kind]).to(torch.float64), labelled(7, padded=True)
    edits, seen = [("blocks.2.hook_mlp_out", halved)], []
    model.add_hook("hook_embed", lambda activation, hook: seen.append(len(activation)))
    expected = [one_by_one(model, data, edits=given)[0] for given in ([], edits, [])]
    for start in (0, 1, 2):
        runs = Runs(model, data, start=start, batch_size=3)
        seen.clear()
        for given, output in zip(([], edits, []), expected, strict=True):
            torch.testing.assert_close(runs.outputs(given), output, rtol=1e-9, atol=1e-9)
        assert not seen
        with pytest.raises(HookError):
            runs.outputs([("hook_embed", halved)])


@pytest.mark.parametrize("start", [None, 0, 1, 2])
def test_encoders_with_decoders_missing_values_and_covariates(start):
    embed = LaggedStepsConfig(5, 2, (1, 2), n_time_features=1)
    sizes = {"n_layers": 3, "n_decoder_layers": 1, "d_model": 8, "n_heads": 2, "d_mlp": 12}
    head = StepParametersConfig(2)
    parts = {"n_channels": embed.n_channels, "norm_position": "post", "embed": embed, "head": head}
    model = HookedTST(HookedTSTConfig(**sizes, **parts)).double()
    series = torch.randn(5, 1, 9).double()
    series[2, 0, 1:3] = torch.nan
    given = {name: torch.randn(shape).double() for name, shape in embed.covariates(5, 9).items()}
    with torch.no_grad():
        output, cache = model.run_with_cache(series, covariates=given)
    hooks = ["encoder.0.hook_mlp_out", "decoder.0.cross_attn.hook_z", "hook_encoded"]
    read = [name for name in hooks if start is None or name != "encoder.0.hook_mlp_out"]
    runs = Runs(model, series, hooks=read, whole=True, covariates=given, batch_size=2, start=start)
    passes = list(runs.passes())
    torch.testing.assert_close(torch.cat([one.output for one in passes]), output)
    for name in read:
        torch.testing.assert_close(torch.cat([one.acts[name] for one in passes]), cache[name])
    assert all(one.observed("decoder.0.hook_mlp_out") is None for one in passes)


def test_hooks_see_what_edits_left_and_whole_runs_go_through_the_head():
    model, data = small(), labelled(5)
    name = "blocks.0.hook_mlp_out"
    first, second = (
        next(Runs(model, data, hooks=[name], whole=whole).passes([(name, halved)]))
        for whole in (False, True)
    )
    expected, acts = one_by_one(model, data, [name])
    torch.testing.assert_close(first.acts[name], acts[name] / 2)
    assert first.output is None and second.output is not None
    edited, _ = one_by_one(model, data, edits=[(name, halved)])
    torch.testing.assert_close(second.output, edited, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(edited, expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("head", ["joined", "each", 1])
def test_a_row_is_what_stands_at_its_place(per_channel, head):
    model, data = small(per_channel), labelled(6, padded=True)
    index = torch.tensor([4, 0, 0, 3])
    name = "blocks.1.attn.hook_z"
    one = Runs(model, data, hooks=[name]).at(index)
    rows, places = one.rows(name, head)
    _, acts = one_by_one(model, data, [name])
    by_series = acts[name].unflatten(0, (len(data), -1))  # [series, channel or 1, pos, head, width]
    assert len(rows) == len(places)
    n_pos = by_series.shape[2]
    per_step = data.n_time // n_pos
    expected = int(sum(data.mask[i].sum() // per_step for i in index)) * by_series.shape[1]
    assert len(rows) == expected * (model.cfg.n_heads if head == "each" else 1)
    for row, (series, channel, pos, at) in zip(rows, places.tolist(), strict=True):
        assert (channel == -1) == (not per_channel) and (at == -1) == (head != "each")
        there = by_series[series, max(channel, 0), pos]
        there = there[at] if head == "each" else there.flatten() if head == "joined" else there[1]
        torch.testing.assert_close(row, there, rtol=1e-4, atol=1e-5)
        assert bool(data.mask[series, pos * per_step])


def test_a_metric_is_read_batch_by_batch_with_its_own_targets():
    model, data = small(), labelled(7, n_classes=4)
    expected, _ = one_by_one(model, data)
    runs = Runs(model, data, batch_size=3)
    log_probs = expected.double().log_softmax(1).gather(1, data.labels[:, None])[:, 0]
    found = runs.measure(of_class("log-probability", data.labels))
    torch.testing.assert_close(found, log_probs, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float64
    own = runs.measure(lambda output: output.amax(1))
    torch.testing.assert_close(own, expected.amax(1).double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(runs.measure(Metric.of(lambda output: output.amax(1))), own)
    with pytest.raises(ArgumentError, match="one value per series"):
        runs.measure(lambda output: output)
    with pytest.raises(ArgumentError, match="finite"):
        runs.measure(lambda output: output.amax(1) / 0)


def test_a_plain_function_or_module_gives_its_outputs_too():
    data = labelled(5, padded=True)

    def mean(series, mask=None):
        return (series * mask[:, None]).sum(2)

    assert torch.equal(Runs(mean, data, batch_size=2).outputs(), mean(data.series, data.mask))
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5)).train()
    x = torch.randn(5, 2, 3)
    assert torch.equal(Runs(module, x, batch_size=2).outputs(), x.flatten(1))
    assert module.training and module[1].training


def test_padding_given_as_a_tensor_is_read_by_nothing():
    model, data = small(), labelled(6, padded=True)
    noise = torch.where(data.mask[:, None], data.series, torch.nan)
    found = Runs(model, noise, data.mask).outputs()
    assert torch.equal(found, Runs(model, data).outputs())


def test_what_does_not_fit_is_refused():
    model, data = small(), labelled(6, padded=True)
    for given, error, words in (
        ({"mask": data.mask}, ArgumentError, "leave out mask="),
        ({"data": data[:0]}, ArgumentError, "at least one series"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"hooks": ["hook_embd"]}, UnknownHookError, "hook_embed"),
        ({"hooks": ["blocks.0.hook_mlp_in"]}, HookError, "set_use_hook_mlp_in"),
        ({"hooks": ["hook_embed"], "start": 1}, HookError, "before the trunk"),
    ):
        with pytest.raises(error, match=words):
            Runs(**{"model": model, "data": data, **given})
    with pytest.raises(ArgumentError, match="stop before the head"):
        Runs(model, data, hooks=["hook_embed"]).outputs()


def test_flags_come_back_after_an_error():
    model = small()
    model.blocks[0].train()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(part.training for part in model.modules())
        raise ZeroDivisionError
    assert model.blocks[0].training and not model.blocks[1].training
