"""Arguments of the wrong kind: refused in words, not in torch's, and never rounded or broadcast."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tstlens.errors import (
    ArgumentError,
    LabelError,
    SeriesShapeError,
    UnknownActivationError,
    UnknownHookError,
)
from tstlens.model import (
    HeadConfig,
    HookedTST,
    HookedTSTConfig,
    LinearPatchesConfig,
    Parity,
    TrunkState,
)

pytestmark = pytest.mark.usefixtures("no_shape_checks")

HOOK = "blocks.0.hook_resid_post"
LABELS = torch.tensor([0, 1, 2, 3])


def same(activation, hook):
    return activation


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda m, x: m(x, "loss", target=[0, 1, 2, 3]),
            LabelError,
            "target as a tensor",
        ),
        (lambda m, x: m(x, "loss", target=LABELS.numpy()), LabelError, "try torch.as_tensor"),
        (lambda m, x: m.check_labels(LABELS.float(), 4, 4), LabelError, "integer labels.*float32"),
        (lambda m, x: m(x, stop_at_layer="1"), ArgumentError, r"stop_at_layer must lie.*got '1'"),
        (lambda m, x: m(x, state=TrunkState()), ArgumentError, "state= .* with start_at_layer"),
        (lambda m, x: m([1.0], start_at_layer=1), SeriesShapeError, "d_model=8.*got list"),
        (lambda m, x: m(x, covariates=[1]), ArgumentError, "covariates as a dict.*got list"),
        (
            lambda m, x: m.unembed(x.numpy()),
            ArgumentError,
            "residual stream .* got ndarray",
        ),
        (lambda m, x: m.time_span("1"), ArgumentError, "pos as an integer, got '1'"),
        (
            lambda m, x: m.time_span(0, n_time=0),
            ArgumentError,
            "n_time .* at least 1 or None",
        ),
        (lambda m, x: m.n_pos(2.5), ArgumentError, "n_time as an integer"),
        (lambda m, x: m.set_use_attn_result("no"), ArgumentError, "True or False, got 'no'"),
        (lambda m, x: m.to("gpu"), ArgumentError, "device as one that this machine has"),
        (lambda m, x: m.to(device="gpu"), ArgumentError, "device as one that this machine has"),
        (lambda m, x: m.save_pretrained(3), ArgumentError, "folder as a string or a path, got 3"),
        (lambda m, x: HookedTST.from_pretrained(None), ArgumentError, "name as .*, got None"),
        (
            lambda m, x: HookedTST.from_pretrained("gunpoint", dtype=torch.int64),
            ArgumentError,
            "a floating point dtype for the model, got torch.int64",
        ),
    ],
)
def test_calls_of_the_model(make_model, series, call, error, words):
    with pytest.raises(error, match=words):
        call(make_model(), series)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda m, x: m.run_with_cache(x, names_filter=3),
            ArgumentError,
            "names_filter as a h",
        ),
        (lambda m, x: m.run_with_cache(x, names_filter=[3]), UnknownHookError, "unknown hook 3"),
        (lambda m, x: m.run_with_cache(x, device="gpu"), ArgumentError, "this machine has"),
        (lambda m, x: m.run_with_cache(x, pos_slice="x"), ArgumentError, "pos_slice as a position"),
        (lambda m, x: m.run_with_cache(x, pos_slice=99), ArgumentError, "outside the 12 positions"),
        (
            lambda m, x: m.run_with_hooks(x, fwd_hooks=(HOOK, same)),
            ArgumentError,
            "list of .hook",
        ),
        (
            lambda m, x: m.run_with_hooks(x, fwd_hooks={HOOK: same}),
            ArgumentError,
            "list of .hook",
        ),
        (lambda m, x: m.run_with_hooks(x, fwd_hooks=[(HOOK, 3)]), ArgumentError, "list of .hook"),
        (lambda m, x: m.add_hook(HOOK, None), ArgumentError, "hook as a function .*got None"),
        (lambda m, x: m.run_with_cache(x)[1][3], UnknownActivationError, "Ask by .name, layer."),
        (lambda m, x: m.run_with_cache(x)[1]["k", "x"], UnknownActivationError, "Ask by"),
    ],
)
def test_hooks_and_caches(make_model, series, call, error, words):
    model = make_model()
    with pytest.raises(error, match=words):
        call(model, series)
    assert not model.is_caching and not any(p.fwd_hooks for p in model.hook_dict.values())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.run_with_codebooks(None, codebooks=3), "codebooks as one, several, or a dict"),
        (lambda m: m.steer(torch.ones(8)).__enter__(), "direction with .hook"),
        (
            lambda m: m.steer(SimpleNamespace(hook=HOOK, vector=torch.ones(8)), "2").__enter__(),
            "strength as a finite number, got '2'",
        ),
        (lambda m: HookedTST("gunpoint"), "expected a HookedTSTConfig, got str"),
        (lambda m: HookedTSTConfig.from_dict([1]), "to_dict.* dictionary, got list"),
        (lambda m: Parity.from_dict({"tolerance": 1}), "the entries inputs, max_abs"),
        (lambda m: m.run_with_saes(None, saes=3), "expected one or several SAEs, got int"),
        (lambda m: LinearPatchesConfig(2, 2, bias="no"), "bias as True or False, got 'no'"),
        (lambda m: HeadConfig("mean", n_classes=2, bias=1), "HeadConfig.bias as True or False"),
    ],
)
def test_splices_steering_and_parts(make_model, call, words):
    with pytest.raises(ArgumentError, match=words):
        call(make_model())
