"""Feature graphs: against spliced runs, finite differences, and sums that have to come out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.saes import hand_made as made
from tstlens import patching, saes
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, HookError, SeriesShapeError
from tstlens.saes.graph import FeatureGraph, FeatureNode

EARLY, LATE = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"


def series_of(data):
    return data.series.double()


@pytest.fixture(scope="module")
def model():
    return made.per_step(n_layers=2, norm_position="pre").double()


@pytest.fixture(scope="module")
def data():
    return made.labelled(n=6, padded=True)


@pytest.fixture(scope="module")
def pair():
    return [
        made.random_dictionary(8, 8, EARLY, seed=1).double(),
        made.random_dictionary(8, 6, LATE, seed=2).double(),
    ]


@pytest.fixture(scope="module")
def graph(model, data, pair) -> FeatureGraph:
    return saes.feature_graph(
        model, pair, data, patching.logit(data.labels), n_latents=99, n_exact=10_000, progress=False
    )


def spliced_logits(model, sae, data, latent, values):
    """The target's logit with one latent set, through the model's own splice."""
    name = f"{sae.cfg.metadata.hook_name}"

    class Set(torch.nn.Module):
        cfg = sae.cfg

        def encode(self, x):
            found = sae.encode(x)
            found[..., latent] = values
            return found

        def decode(self, latents):
            return sae.decode(latents)

    clean = {}

    def keep(activation, hook):
        clean[hook.name] = activation

    model.run_with_hooks(series_of(data), mask=data.mask, fwd_hooks=[(name, keep)])
    missed = clean[name] - sae.decode(sae.encode(clean[name]))

    def add_error(activation, hook):
        return activation + missed

    with model.saes(Set(), use_error_term=False):
        hooks = [(f"{name}.hook_sae_output", add_error)]
        out = model.run_with_hooks(series_of(data), mask=data.mask, fwd_hooks=hooks)
    return out.gather(1, data.labels[:, None])[:, 0]


@torch.no_grad()
def test_measured_effects_equal_runs_with_the_dictionaries_spliced_in(model, data, pair, graph):
    early, late = pair
    value = model(series_of(data), mask=data.mask).gather(1, data.labels[:, None])[:, 0]
    torch.testing.assert_close(graph.value, value)
    checked = 0
    for index, node in enumerate(graph.nodes):
        if node.latent is None:
            continue
        edited = spliced_logits(model, pair[node.layer], data, node.latent, 0.0)
        torch.testing.assert_close(graph.exact_nodes[:, index], value - edited)
        checked += 1
    assert checked > 8
    pos_mask = data.mask  # one position per step
    for first, then in ((0, -1), (1, -3), (3, -4)):
        source, target = graph.nodes[first], graph.nodes[then]
        seen = {}

        def remove(activation, hook, source=source):
            amount = early.encode(activation)[..., source.latent] * pos_mask
            return activation - amount[..., None] * early.W_dec[source.latent]

        def keep(activation, hook, seen=seen):
            seen["late"] = activation

        model.run_with_hooks(
            series_of(data), mask=data.mask, fwd_hooks=[(EARLY, remove), (LATE, keep)]
        )
        if target.latent is None:
            continue
        latents = late.encode(seen["late"])[..., target.latent]
        edited = spliced_logits(model, late, data, target.latent, latents)
        torch.testing.assert_close(graph.exact_edges[:, first, then], value - edited)


def test_small_changes_are_estimated_exactly(model, data, pair):
    """Against a baseline close by, gradients are the measured effects: an end to end check."""
    generator = torch.Generator().manual_seed(3)
    nearby = series_of(data) + 1e-6 * torch.randn(data.series.shape, generator=generator)
    graph = saes.feature_graph(
        model, pair, data, patching.logit(data.labels), baseline=nearby, n_latents=99,
        n_exact=10_000, progress=False,
    )  # fmt: skip
    for estimate, exact in (
        (graph.node_effects, graph.exact_nodes),
        (graph.edge_effects, graph.exact_edges),
    ):
        torch.testing.assert_close(estimate, exact, rtol=1e-2, atol=1e-10, equal_nan=True)
        assert float(exact.nan_to_num().abs().max()) > 1e-8
    assert graph.agreement()["pearson"].min() > 0.9999


def test_what_goes_through_a_later_stream_adds_up_to_the_whole(graph):
    """Everything passes the residual stream after block 1: through its latents or its error."""
    late = [index for index, node in enumerate(graph.nodes) if node.layer == 1]
    early = [index for index, node in enumerate(graph.nodes) if node.layer == 0]
    through = graph.edge_effects[:, early][:, :, late].sum(2)
    torch.testing.assert_close(through, graph.node_effects[:, early])
    assert float(through.abs().max()) > 1e-3


def test_averaged_gradients_add_up_to_what_the_whole_activation_does(model, data, pair):
    graph = saes.feature_graph(
        model, pair, data, patching.logit(data.labels), baseline="mean", n_latents=99, n_exact=0,
        steps=40, progress=False,
    )  # fmt: skip
    kept = {}

    def keep(activation, hook):
        kept[hook.name] = activation

    model.run_with_hooks(series_of(data), mask=data.mask, fwd_hooks=[(EARLY, keep), (LATE, keep)])
    for layer, hook in enumerate((EARLY, LATE)):
        mean = kept[hook][data.mask].mean(0)

        def replace(activation, hook, mean=mean):
            return torch.where(data.mask[:, :, None], mean, activation)

        out = model.run_with_hooks(series_of(data), mask=data.mask, fwd_hooks=[(hook, replace)])
        expected = graph.value - out.gather(1, data.labels[:, None])[:, 0].detach()
        nodes = [
            index
            for index, node in enumerate(graph.nodes)
            if node.layer == layer and node.latent is None
        ]
        found = graph.latent_effects[layer].sum(1) + graph.node_effects[:, nodes].sum(1)
        # The dictionaries' biases are no node: they do not change.
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0.05)


def test_a_full_cut_in_between_leaves_no_edge_around_it(model, data, pair):
    middle = made.random_dictionary(8, 10, "blocks.0.hook_resid_post", seed=5).double()
    saes_here = [pair[0], middle, pair[1]]
    graph = saes.feature_graph(
        model, saes_here[::-1], data, patching.logit(data.labels), progress=False
    )
    assert graph.hooks == (EARLY, "blocks.0.hook_resid_post", LATE)
    layer = torch.tensor([node.layer for node in graph.nodes])
    around = graph.edge_effects[:, layer == 0][:, :, layer == 2]
    assert bool((around == 0).all())
    assert float(graph.edge_effects[:, layer == 0][:, :, layer == 1].abs().max()) > 1e-4
    backwards = graph.edge_effects[:, layer == 2][:, :, layer == 0]
    assert bool(backwards.isnan().all())


def test_an_mlp_in_between_lets_the_stream_pass(model, data, pair):
    """Holding block 1's MLP takes away that path alone: the residual stream goes on."""
    mlp = made.random_dictionary(8, 3, "blocks.1.hook_mlp_out", seed=5).double()
    options = {"n_latents": 99, "n_exact": 300, "progress": False}
    metric = patching.logit(data.labels)
    whole = saes.feature_graph(model, pair, data, metric, **options)
    held = saes.feature_graph(model, [pair[0], mlp, pair[1]], data, metric, **options)
    at = {node.name: index for index, node in enumerate(held.nodes)}
    names = [node.name for node in whole.nodes]
    first, then = at[names[0]], at[f"{LATE}/error"]
    clean = {}

    def keep(activation, hook):
        clean[hook.name] = activation.detach()

    model.run_with_hooks(series_of(data), mask=data.mask,
                         fwd_hooks=[(LATE, keep), ("blocks.1.hook_mlp_out", keep)])  # fmt: skip
    node = whole.nodes[0]

    def remove(activation, hook):
        amount = pair[0].encode(activation)[..., node.latent] * data.mask
        return activation - amount[..., None] * pair[0].W_dec[node.latent]

    def hold(activation, hook):
        return clean[hook.name]

    seen = {}

    def look(activation, hook):
        seen["late"] = activation
        error = activation - pair[1].decode(pair[1].encode(activation))
        before = clean[LATE] - pair[1].decode(pair[1].encode(clean[LATE]))
        return clean[LATE] + torch.where(data.mask[:, :, None], error - before, 0.0)

    hooks = [(EARLY, remove), ("blocks.1.hook_mlp_out", hold), (LATE, look)]
    out = model.run_with_hooks(series_of(data), mask=data.mask, fwd_hooks=hooks)
    expected = held.value - out.gather(1, data.labels[:, None])[:, 0].detach()
    torch.testing.assert_close(held.exact_edges[:, first, then], expected)
    assert not torch.allclose(expected, whole.exact_edges[:, 0, names.index(f"{LATE}/error")])


def test_padding_has_no_part(model, data, pair):
    other = data.series.clone()
    other[~data.mask[:, None].expand_as(other)] = -3.0
    options = {"metric": patching.logit(data.labels), "baseline": "mean", "progress": False}
    first = saes.feature_graph(model, pair, data, **options)
    second = saes.feature_graph(model, pair, dataclasses.replace(data, series=other), **options)
    assert first.nodes == second.nodes
    for name in ("node_effects", "edge_effects", "exact_nodes", "exact_edges"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), equal_nan=True)


def test_batches_and_seeds_repeat(model, data, pair):
    options = {"metric": patching.logit(data.labels), "n_latents": 3, "n_controls": 2}
    whole = saes.feature_graph(model, pair, data, progress=False, **options)
    parts = saes.feature_graph(model, pair, data, batch_size=2, progress=False, **options)
    assert whole.nodes == parts.nodes and bool((whole.kept == parts.kept).all())
    torch.testing.assert_close(whole.edge_effects, parts.edge_effects, equal_nan=True)
    torch.testing.assert_close(whole.exact_edges, parts.exact_edges, equal_nan=True)

    def target(output):
        return output.gather(1, data.labels[:, None])[:, 0]

    own = saes.feature_graph(model, pair, data, target, n_latents=3, n_controls=2, progress=False)
    torch.testing.assert_close(own.node_effects, whole.node_effects)
    assert own.metric == "target" and own.unit == "value"


def test_forecasters_that_run_channels_apart_and_transcoders():
    model, given = made.per_channel(), made.labelled(n=4, n_channels=3, n_time=32)
    transcoder = made.random_dictionary(
        8, 12, "blocks.0.hook_resid_mid", hook_name_out="blocks.0.hook_mlp_out"
    )
    dictionaries = [transcoder, made.random_dictionary(8, 10, LATE, seed=2)]
    target = torch.randn(4, 3, 4)
    graph = saes.feature_graph(
        model, dictionaries, given, patching.mse(target), n_latents=3, progress=False
    )
    index = 1
    latent = graph.nodes[index].latent
    assert latent is not None

    def remove(activation, hook):
        return activation - amount[..., latent, None] * transcoder.W_dec[latent]

    _, cache = model.run_with_cache(given.series)
    amount = transcoder.encode(cache["blocks.0.hook_resid_mid"])
    hooks = [("blocks.0.hook_mlp_out", remove)]
    out = model.run_with_hooks(given.series, fwd_hooks=hooks)
    expected = ((cache_out(model, given) - target) ** 2).mean((1, 2)) - ((out - target) ** 2).mean(
        (1, 2)
    )
    torch.testing.assert_close(graph.exact_nodes[:, index], expected.detach())


def cache_out(model, data):
    return model(data.series)


def test_one_head_and_every_head_by_itself():
    model, given = made.per_step(n_layers=2), made.labelled(n=4)
    z = "blocks.0.attn.hook_z"
    each = made.random_dictionary(4, 6, z)
    one = made.random_dictionary(4, 6, z, hook_head_index=1)
    late = made.random_dictionary(8, 10, LATE, seed=2)
    metric = patching.logit(given.labels)
    options = {"n_latents": 99, "n_exact": 10_000, "progress": False}
    all_heads = saes.feature_graph(model, [each, late], given, metric, **options)
    single = saes.feature_graph(model, [one, late], given, metric, **options)
    at = {node.name: index for index, node in enumerate(all_heads.nodes)}
    compared = 0
    for index, node in enumerate(single.nodes):
        if node.layer == 0 and node.latent is not None:
            same = at[f"{z}/{6 + node.latent}"]
            torch.testing.assert_close(
                all_heads.exact_nodes[:, same], single.exact_nodes[:, index], atol=1e-6, rtol=1e-4
            )
            compared += 1
    assert compared > 2


def hand_made_graph(exact_edges=None):
    nodes = (
        FeatureNode(0, "a", 3),
        FeatureNode(0, "a", 5, control=True),
        FeatureNode(1, "b", 1),
        FeatureNode(1, "b", None),
    )
    nan = torch.nan
    edge = torch.full((2, 4, 4), nan)
    edge[:, 0, 2], edge[:, 0, 3], edge[:, 1, 2], edge[:, 1, 3] = 2.0, -0.5, 0.1, 0.0
    exact = torch.full((2, 4, 4), nan)
    exact[:, 0, 2], exact[:, 1, 2] = 4.0, 0.2
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[0, 2] = kept[0, 3] = True
    return FeatureGraph(
        nodes=nodes,
        node_effects=torch.tensor([[1.0, 0.1, 3.0, -1.0], [2.0, 0.1, 3.0, -1.0]]),
        edge_effects=edge,
        kept=kept,
        exact_nodes=torch.tensor([[1.0, nan, 2.0, nan], [1.0, nan, 2.0, nan]]),
        exact_edges=exact if exact_edges is None else exact_edges,
        latent_effects=(
            torch.tensor([[0.0, 0, 0, 1, 0, 0.1], [0, 0, 0, 2, 0, 0.1]]),
            torch.tensor([[5.0, 3], [-5, 3]]),
        ),
        value=torch.zeros(2),
        metric="logit of the target class",
        unit="logit",
        baseline="zero",
    )


def test_tables_of_a_graph_by_hand():
    graph = hand_made_graph()
    edges = graph.to_dataframe()
    assert edges["source"].tolist() == ["a/3", "a/3", "a/5", "a/5"]
    assert edges["target"].tolist() == ["b/1", "b/error", "b/1", "b/error"]
    assert edges["kept"].tolist() == [True, True, False, False]
    assert edges["control"].tolist() == [False, False, True, True]
    nodes = graph.node_table().set_index("node")
    assert nodes.loc["a/3", "effect"] == 1.5 and nodes.loc["a/3", "exact"] == 1.0
    assert nodes.loc["a/3", "se"] == pytest.approx(0.5)
    agreement = graph.agreement()
    assert agreement.loc["edges", "slope"] == pytest.approx((4 * 2 + 0.2 * 0.1) / (16 + 0.04))
    assert agreement.loc["edges", "n"] == 2 and agreement.loc["edges", "sign"] == 1
    controls = graph.controls()
    assert controls.loc["kept edges"].tolist() == pytest.approx([1, 2.0, 1, 4.0])
    assert controls.loc["edges of random latents"].tolist() == pytest.approx([1, 0.1, 1, 0.2])
    assert controls.loc["random latents", "n_exact"] == 0
    coverage = graph.coverage()
    assert coverage.loc["a", "latents"] == pytest.approx(1.6)
    assert coverage.loc["a", "shown"] == pytest.approx(1.5)
    assert coverage.loc["b", "error"] == -1.0
    assert graph.top_latents(0, 1)[["hook", "latent", "effect"]].values.tolist() == [["b", 0, 5.0]]
    assert graph.top_latents(n=2)["latent"].tolist() == [1, 3]  # b/0 cancels over series


def test_chosen_latents_beat_random_ones(graph, model, data, pair):
    found = saes.feature_graph(
        model, pair, data, patching.logit(data.labels), n_latents=3, n_exact=60, progress=False
    ).controls()
    assert found.loc["strongest latents", "exact"] > 2 * found.loc["random latents", "exact"]


def test_top_latents_for_one_prediction_by_exact_ablation(model, data, pair):
    """The sweep over a spliced dictionary's latents says the same as the graph's nodes."""
    one = data[:1]
    graph = saes.feature_graph(
        model, pair[1], one, patching.logit(one.labels), n_latents=99, n_exact=99, progress=False
    )
    hooked = Hooked(pair[1])
    with model.saes(hooked, use_error_term=True):
        swept = patching.sweep(
            model, series_of(one), series_of(one), f"{LATE}.hook_sae_acts_post", ("latent",),
            patching.logit(one.labels), source="zero", clean_mask=one.mask,
            corrupted_mask=one.mask, progress=False,
        )  # fmt: skip
    for index, node in enumerate(graph.nodes):
        if node.latent is not None:
            torch.testing.assert_close(graph.exact_nodes[:, index], -swept.effect()[:, node.latent])
    best = swept.top(1)
    assert int(best["feature" if "feature" in best else "latent"][0]) in {
        node.latent for node in graph.nodes
    }


class Hooked(torch.nn.Module):
    """A hand-made dictionary with a hook point on its latents."""

    def __init__(self, inner):
        super().__init__()
        from transformer_lens.hook_points import HookPoint

        self.inner, self.cfg, self.hook_sae_acts_post = inner, inner.cfg, HookPoint()

    def encode(self, x):
        return self.hook_sae_acts_post(self.inner.encode(x))

    def decode(self, latents):
        return self.inner.decode(latents)


class Lookup(made.Dictionary):
    """Latents without a gradient, as a codebook's."""

    def encode(self, x):
        return (super().encode(x) > 0).detach().to(x)


def test_errors_of_feature_graphs(model, data, pair, no_shape_checks):
    metric = patching.logit(data.labels)

    def call(dictionaries=pair, given=data, of=metric, **options):
        return saes.feature_graph(model, dictionaries, given, of, progress=False, **options)

    with pytest.raises(ArgumentError, match="at least one dictionary, got none"):
        call([])
    with pytest.raises(ArgumentError, match="n_latents as an integer of at least 1, got 0"):
        call(n_latents=0)
    with pytest.raises(ArgumentError, match=r"baseline 'zero', 'mean' or series .* got 'median'"):
        call(baseline="median")
    with pytest.raises(SeriesShapeError, match=r"baseline series like the data \[6, 2, 16\]"):
        call(baseline=data.series[:2])
    with pytest.raises(SeriesShapeError, match="targets for 2 series, the data are 6"):
        call(of=patching.logit(data.labels[:2]))
    with pytest.raises(ArgumentError, match="such as patching.logit"):
        call(of="logit")
    with pytest.raises(ArgumentError, match=r"one value per series \[6\], got \[6, 3\]"):
        call(of=lambda output: output)
    with pytest.raises(ArgumentError, match="gives no gradient"):
        call(of=lambda output: output.detach()[:, 0])
    with pytest.raises(ArgumentError, match="two that write blocks.0.hook_mlp_out"):
        call([pair[0], made.random_dictionary(8, 4, EARLY).double()])
    with pytest.raises(ArgumentError, match="neither is upstream of the other"):
        over = made.random_dictionary(8, 4, "hook_embed", hook_name_out=LATE).double()
        call([pair[0], over])
    with pytest.raises(ArgumentError, match="have no gradient .*can only come first"):
        one = pair[1]
        call([pair[0], Lookup(one.W_enc.data, one.W_dec.data, LATE)])
    with pytest.raises(SeriesShapeError, match="width d_in=6 at blocks.1.hook_resid_post"):
        call([pair[0], made.random_dictionary(6, 4, LATE).double()])
    with pytest.raises(HookError, match="no positions"):
        call([made.random_dictionary(8, 4, "head.hook_pooled").double()])
    with pytest.raises(ArgumentError, match="data bring their own mask"):
        call(mask=data.mask)
    with pytest.raises(ArgumentError, match=r"a series in 0..1, got 2"):
        hand_made_graph().top_latents(2)
    assert isinstance(data, TimeSeriesData)
