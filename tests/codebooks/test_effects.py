"""What forcing and banning did, against plain hooks; controls as frequent; the figure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tstlens import figures
from tstlens.codebooks import CodeEffects, ban_nearest, effects
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError
from tstlens.model import HeadConfig

MLP_OUT, Z, POST = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", ".hook_sae_acts_post"


@pytest.fixture
def data(series, mask) -> TimeSeriesData:
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    return TimeSeriesData(series, labels, ("a", "b", "c", "d"), mask=mask, name="toy", split="test")


def chance(output, label=2):
    return output.softmax(-1)[:, label].detach().double().numpy()


def test_values_and_controls_equal_plain_hooks_and_skip_padding(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT)
    found = effects(model, data, {MLP_OUT: 5}, label=2, n_controls=3, batch_size=4, progress=False)
    assert found.doses == (1, 2, 4, 8, 10) and found.values.shape == (5, 6)
    np.testing.assert_allclose(found.baseline, chance(model(data.series, mask=data.mask)), 1e-5)

    def put(code):
        def edit(acts, hook):
            return torch.nn.functional.one_hot(torch.tensor(code), 16).float().expand_as(acts)

        hooks = [(MLP_OUT + POST, edit)]
        return chance(model.run_with_hooks(data.series, mask=data.mask, fwd_hooks=hooks))

    np.testing.assert_allclose(found.values[-1], put(5), rtol=1e-5)
    for at, control in enumerate(found.control_codes):
        (code,) = control[MLP_OUT][0]
        np.testing.assert_allclose(found.controls[at, -1], put(code), rtol=1e-5)
    # The row with four observed positions is all forced from dose 4 on; one with ten is not.
    np.testing.assert_allclose(found.values[2, 3], found.values[-1, 3], rtol=1e-5)
    assert abs(found.values[2, 0] - found.values[-1, 0]) > 1e-6
    np.testing.assert_allclose(found.effect(), found.values - found.baseline)


def test_a_dose_of_one_is_one_observed_position_of_every_series(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT)
    found = effects(model, data, {MLP_OUT: 5}, label=2, doses=[1], n_controls=2, progress=False)
    for row in range(6):
        one, observed = data.series[row : row + 1], data.mask[row : row + 1]
        options = []
        for pos in range(int(observed.sum())):
            with model.force_codes({MLP_OUT: 5}, pos=pos):
                options.append(chance(model(one, mask=observed))[0])
        assert np.abs(np.array(options) - found.values[0, row]).min() < 1e-6


def test_controls_are_as_frequent_and_never_the_codes_themselves(model, make_book, data):
    model.add_codebook(make_book(n_codes=40, n_groups=2, k=2), Z)
    ids = model.code_ids(data.series, data.mask)[Z][data.mask]  # [place, group, k]
    counts = [np.bincount(ids[:, g].flatten(), minlength=40) / len(ids) for g in (0, 1)]
    asked = {Z: {0: [3, 7], 1: 9}}
    found = effects(model, data, asked, label=1, n_controls=5, doses=[10], progress=False)
    assert found.codes == {Z: {0: [3, 7], 1: [9]}}
    shares = [counts[0][3], counts[0][7], counts[1][9]]
    assert found.frequency == pytest.approx(np.mean(shares))
    for at, control in enumerate(found.control_codes):
        first, second = control[Z][0], control[Z][1]
        assert len(set(first)) == 2 and not {3, 7} & set(first) and second != [9]
        mean = np.mean([*counts[0][first], *counts[1][second]])
        assert found.control_frequency[at] == pytest.approx(mean)
        # Nobody left out is nearer in frequency than the last of the pool: 5 + 2 - 1 of 38.
        for code, control_code in zip([3, 7], first, strict=True):
            others = np.delete(counts[0], [3, 7])
            away = np.sort(np.abs(others - counts[0][code]))
            assert abs(counts[0][control_code] - counts[0][code]) <= away[5] + 1e-12
    again = effects(model, data, asked, label=1, n_controls=5, doses=[10], progress=False)
    assert again.control_codes == found.control_codes
    np.testing.assert_array_equal(again.controls, found.controls)
    other = effects(model, data, asked, label=1, n_controls=5, doses=[10], seed=1, progress=False)
    assert other.control_codes != found.control_codes


def test_banning_everywhere_equals_the_context(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT)
    ids = model.code_ids(data.series, data.mask)[MLP_OUT]
    code = int(ids[ids >= 0].mode().values)
    options = {"action": "ban", "label": 2, "measure": "log_probability", "doses": [10]}
    found = effects(model, data, {MLP_OUT: code}, n_controls=2, progress=False, **options)
    with model.ban_codes({MLP_OUT: code}):
        expected = np.log(chance(model(data.series, mask=data.mask)))
    np.testing.assert_allclose(found.values[0], expected, rtol=1e-5)
    assert found.measure == "log probability of class c (label 2) (nats)"
    assert np.abs(found.effect()).max() > 1e-6


def test_a_forecast_is_measured_by_its_mean(make_model, make_book, series):
    model = make_model(head=HeadConfig("flatten", horizon=4))
    model.add_codebook(make_book(), MLP_OUT)
    data = TimeSeriesData(series)
    found = effects(model, data, {MLP_OUT: 5}, doses=[10], n_controls=2, progress=False)
    with model.force_codes({MLP_OUT: 5}):
        expected = model(series).detach().mean((1, 2))
    np.testing.assert_allclose(found.values[0], expected.numpy(), rtol=1e-5, atol=1e-6)
    assert found.measure == "mean forecast"


def made(effect, controls) -> CodeEffects:
    effect, controls = np.asarray(effect, dtype=float), np.asarray(controls, dtype=float)
    return CodeEffects(
        values=effect[None] + 0.25,
        controls=controls[:, None] + 0.25,
        baseline=np.full(len(effect), 0.25),
        doses=(3,),
        measure="probability of class 1",
        action="force",
        codes={MLP_OUT: {0: [5]}},
        control_codes=tuple({MLP_OUT: {0: [code]}} for code in range(len(controls))),
        frequency=0.1,
        control_frequency=np.full(len(controls), 0.1),
    )


def test_the_summary_is_scipys_test_of_the_paired_differences():
    generator = np.random.default_rng(0)
    effect, controls = generator.normal(0.5, 1, 30), generator.normal(0, 1, (9, 30))
    row = made(effect, controls).summary().iloc[0]
    difference = effect - controls.mean(0)
    assert row.effect == pytest.approx(effect.mean())
    assert row.control == pytest.approx(controls.mean())
    t = stats.ttest_rel(effect, controls.mean(0)).statistic
    assert row.d == pytest.approx(t / np.sqrt(30))
    assert row.p_series == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert row.p_codes == pytest.approx((1 + (controls.mean(1) >= effect.mean()).sum()) / 10)
    equal = made(np.full(8, 0.3), np.zeros((4, 8))).summary().iloc[0]
    assert equal.d == np.inf and equal.p_codes == 1 / 5
    nothing = made(np.zeros(8), np.zeros((4, 8))).summary().iloc[0]
    assert np.isnan(nothing.d) and nothing.p_codes == 1


def test_the_frame_and_the_figure_hold_the_numbers():
    result = made([0.1, 0.3], [[0.0, 0.1], [0.2, 0.0]])
    assert "force" in repr(result) and "by positions {3: +0.2}, 2 controls" in repr(result)
    frame = result.to_dataframe()
    assert len(frame) == 6
    row = frame[(frame.control == 1) & (frame.series == 0)].iloc[0]
    assert (row.dose, row.value, row.effect) == (3, pytest.approx(0.45), pytest.approx(0.2))
    figure = result.figure()
    by_name = {trace.name: trace for trace in figure.data}
    assert by_name["code 5 at L0.hook_mlp_out"].y == pytest.approx([0.2])
    assert by_name["their mean"].y == pytest.approx([0.075])
    assert "change of probability of class 1" in figure.layout.annotations[0].text
    assert figures.draw.dispatch(CodeEffects).__name__ == "draw_code_effects"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"label=, a class in 0..3"),
        ({"label": 4}, r"a class in 0..3 to measure the probability of, got 4"),
        ({"label": 1, "measure": "loss"}, "'probability', 'log_probability', 'forecast'"),
        ({"label": 1, "measure": "forecast"}, "is for forecasters"),
        ({"label": 1, "doses": [0]}, r"doses in 1..10 positions, got \[0\]"),
        ({"label": 1, "n_controls": 16}, "at least 16 other codes .* got 15; ask for fewer"),
        ({"label": 1, "action": "swap"}, "action as 'force' or 'ban', got 'swap'"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, make_book, data, options, message, request):
    request.getfixturevalue("no_shape_checks")
    model.add_codebook(make_book(), MLP_OUT)
    with pytest.raises(ArgumentError, match=message):
        effects(model, data, {MLP_OUT: 5}, progress=False, **options)


def test_a_codebook_that_is_off_has_no_effects(model, make_book, data):
    model.add_codebook(make_book(), MLP_OUT)
    model.set_snapping(False)
    with pytest.raises(HookError, match="is switched off"):
        effects(model, data, {MLP_OUT: 5}, label=1, progress=False)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("pos", [None, [0, 4]])
def test_the_nearest_codes_are_banned_whichever_they_are(model, make_book, data, n, pos):
    """The codes of a codebook with n more active are the banned ones, then those that follow."""
    book = make_book(k=2)
    model.add_codebook(book, MLP_OUT)
    _, cache = model.run_with_cache(data.series, names_filter=MLP_OUT + ".hook_sae_acts_pre")
    order = cache[MLP_OUT + ".hook_sae_acts_pre"].argsort(-1, descending=True)  # [row, pos, code]
    with ban_nearest(model, n, pos=pos):
        ids = model.code_ids(data.series)[MLP_OUT]
    expected = order[..., :2].clone()
    where = slice(None) if pos is None else pos
    expected[:, where] = order[:, where, n : n + 2]
    assert torch.equal(ids, expected)
    with ban_nearest(model, n, fill="zero", pos=pos):
        ids = model.code_ids(data.series)[MLP_OUT]
    expected = order[..., :2].clone()
    expected[:, where, : min(n, 2)] = -1
    assert torch.equal(ids.sort(-1).values, expected.sort(-1).values)
    assert torch.equal(model.code_ids(data.series)[MLP_OUT], order[..., :2])


def test_the_nearest_codes_of_one_group_or_head_are_banned_alone(make_model, make_book, data):
    for options, table in (({"d_in": 8, "n_groups": 2}, "group"), ({"d_in": 4}, "head")):
        model = make_model()
        model.add_codebook(make_book(**options), Z)
        before = model.code_ids(data.series)[Z][..., 0]  # [row, pos, group or head]
        with ban_nearest(model, hooks=Z, **{table: 1}):
            after = model.code_ids(data.series)[Z][..., 0]
        assert (
            torch.equal(after[..., 0], before[..., 0]) and (after[..., 1] != before[..., 1]).all()
        )
    with pytest.raises(ArgumentError, match="leaves fewer than k=1"), ban_nearest(model, 16):
        pass
    model.set_snapping(False)
    with pytest.raises(HookError, match="is switched off"), ban_nearest(model):
        pass
