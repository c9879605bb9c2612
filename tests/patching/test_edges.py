"""Exact edge patching, sets of edges and edge attribution, on random models of every kind."""

from __future__ import annotations

import pytest
import torch

from tests.patching.conftest import make_case
from tests.patching.edge_oracle import patched_output
from tstlens import patching
from tstlens.errors import (
    ArgumentError,
    HookError,
    SeriesShapeError,
    TstlensError,
    UnknownSiteError,
)
from tstlens.patching.circuits import (
    ComponentGraph,
    component_graph,
    edge_attribution,
    edge_sweep,
    follow_paths,
    path_patch,
)
from tstlens.patching.circuits.edges import edge_gradients
from tstlens.patching.circuits.streams import record_components, run_edge_sets


@pytest.fixture
def double(case):
    """The case in double precision, where finite differences can be trusted."""
    case.model.to(torch.float64)
    return type(case)(case.model, case.clean.double(), case.corrupted.double())


def both_runs(case):
    return record_components(case.model, case.corrupted, None), record_components(
        case.model, case.clean, None
    )


@torch.no_grad()
def outputs(case, graph, masks):
    here, there = both_runs(case)
    return torch.cat(list(run_edge_sets(case.model, graph, here, there, masks)))


def masks_of(graph, numbers):
    return torch.stack([graph.mask(torch.tensor([number])) for number in numbers])


def test_the_graph_has_every_edge_that_goes_forward_and_no_other():
    graph = ComponentGraph(n_layers=2, n_heads=2)
    ports = {"embed": 15, "L0H0": 9, "L0H1": 9, "L0MLP": 8, "L1H0": 2, "L1H1": 2, "L1MLP": 1}
    for name, count in ports.items():
        assert sum(edge.sender.name == name for edge in graph.edges) == count, name
    assert len(graph.edges) == sum(ports.values())
    assert len({edge.name for edge in graph.edges}) == len(graph.edges)
    split = ComponentGraph(n_layers=2, n_heads=2, n_pos=5, n_channels=3)
    assert len(split.edges) == 46 - 15 + 5 * 15 + 3 * 5
    assert "channel2->pos4" in {edge.name for edge in split.edges}
    assert "channel2->L0H0.q" not in {edge.name for edge in split.edges}


def test_each_edge_gives_what_a_hook_on_one_input_gives(case):
    metric = patching.log_prob(case.target)
    effects = edge_sweep(case.model, case.clean, case.corrupted, metric, progress=False)
    chosen = torch.randperm(len(effects.edges), generator=torch.Generator().manual_seed(0))[:8]
    chosen = [*chosen.tolist(), *range(len(effects.edges) - 6, len(effects.edges))]
    for number in chosen:
        edge = effects.edges[number]
        expected = metric(patched_output(case.model, case.clean, case.corrupted, edge))
        torch.testing.assert_close(
            effects.values[:, number], expected, atol=2e-5, rtol=1e-4, msg=edge.name
        )


@pytest.mark.parametrize("channels", [False, True])
def test_edges_one_by_one_are_sets_of_one_edge(case, channels):
    metric = patching.logit(case.target)
    effects = edge_sweep(
        case.model,
        case.clean,
        case.corrupted,
        metric,
        channels=channels,
        memory_mb=0.2,
        progress=False,
    )
    numbers = range(0, len(effects.edges), 3 if channels else 5)
    expected = metric(outputs(case, effects.graph, masks_of(effects.graph, numbers)))
    torch.testing.assert_close(effects.values[:, :: numbers.step], expected.T, atol=2e-5, rtol=1e-4)


def test_all_edges_are_the_clean_run_and_none_the_corrupted_run(case):
    for positions, channels in ((True, False), (False, False), (True, True), (False, True)):
        graph = component_graph(case.model, positions=positions, channels=channels)
        masks = torch.stack([torch.zeros_like(graph.allowed), graph.allowed])
        none, all_edges = outputs(case, graph, masks)
        torch.testing.assert_close(none, case.model(case.corrupted), atol=1e-4, rtol=0)
        torch.testing.assert_close(all_edges, case.model(case.clean), atol=1e-4, rtol=0)


def test_without_positions_the_embedding_is_one_node(case):
    metric = patching.logit(case.target)
    graph = component_graph(case.model)
    whole = edge_sweep(
        case.model, case.clean, case.corrupted, metric, positions=False, progress=False
    )
    port = graph.ports("L1H1.v")[0]
    mask = torch.zeros_like(graph.allowed)
    mask[graph.sender_at("pos"), port] = True
    expected = metric(outputs(case, graph, mask[None]))[0]
    found = whole.values[:, whole.coords["edge"].index("embed->L1H1.v")]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [False, True])
def test_attribution_is_the_gradient_of_a_mask_on_the_edge(double, channels):
    case, metric = double, patching.log_prob(double.target)
    graph = component_graph(case.model, channels=channels)
    found = edge_attribution(
        case.model, case.clean, case.corrupted, metric, channels=channels, progress=False
    ).effect()
    here, there = both_runs(case)
    mask = torch.zeros(1, *graph.allowed.shape, dtype=torch.float64)
    numbers = range(0, len(graph.edges), 7)
    if channels:  # which channel is heard is a choice and not a number: a small step instead
        small = here.series + 1e-6 * (there.series - here.series)
        for number in range(0, graph.n_channels * graph.n_inputs, 3):
            edge = graph.edges[number]
            series = here.series.clone()
            series[:, edge.sender.index] = small[:, edge.sender.index]
            pos = edge.receiver.index
            with torch.no_grad():
                stream = here.pre[0].clone()
                stream[:, pos] = case.model.embed_series(series)[0][:, pos]
                out = case.model(stream, start_at_layer=0, state=here.state)
                slope = (metric(out) - metric(here.output)) / 1e-6
            torch.testing.assert_close(found[:, number], slope, atol=1e-4, rtol=1e-4)
        return
    mask.requires_grad_()
    (out,) = run_edge_sets(case.model, graph, here, there, mask)
    values = metric(out)[0]
    slopes = torch.stack([torch.autograd.grad(v, mask, retain_graph=True)[0][0] for v in values])
    expected = slopes[:, graph.index[:, 0], graph.index[:, 1]]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # And the same by finite differences, for some.
    with torch.no_grad():
        steps = masks_of(graph, numbers).double() * 1e-6
        (moved,) = run_edge_sets(case.model, graph, here, there, steps)
        slope = (metric(moved) - metric(here.output)) / 1e-6
    torch.testing.assert_close(found[:, :: numbers.step], slope.T, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_along_the_edges_it_is_the_gradient_where_all_masks_are_the_share(double, share):
    case, metric = double, patching.log_prob(double.target)
    graph = component_graph(case.model)
    here, there = both_runs(case)
    found = edge_gradients(case.model, graph, here, there, metric, share, "edges")
    mask = (share * graph.allowed.double())[None].requires_grad_()
    (out,) = run_edge_sets(case.model, graph, here, there, mask)
    slopes = [torch.autograd.grad(v, mask, retain_graph=True)[0][0] for v in metric(out)[0]]
    expected = torch.stack(slopes) * graph.allowed
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["pre-norm per step, max", "post-norm conv stem, mean"])
def test_along_the_edges_the_estimates_add_up_to_the_gap(kind):
    case = make_case(kind)
    effects = edge_attribution(
        case.model,
        case.clean,
        case.corrupted,
        patching.log_prob(case.target),
        steps=40,
        along="edges",
        channels=True,
        progress=False,
    )
    gap = effects.clean - effects.baseline
    torch.testing.assert_close(effects.effect().sum(1), gap, atol=0.1, rtol=0.1)


def test_blocks_of_pairs_give_what_all_pairs_give(case):
    metric = patching.logit(case.target)
    runs = (case.model, case.clean, case.corrupted, metric)
    whole = edge_attribution(*runs, steps=2, progress=False)
    split = edge_attribution(*runs, steps=2, pairs_at_once=1, progress=False)
    torch.testing.assert_close(whole.values, split.values, atol=5e-5, rtol=1e-4)


def test_paths_of_one_edge_are_edges_and_senders_add_nothing(case):
    metric = patching.logit(case.target)
    runs = (case.model, case.clean, case.corrupted)
    names = ["pos2->L0H1.q", "L0H2->L1H0.k", "L0MLP->L1MLP", "L1H1->output", "pos3->L1MLP"]
    edges = edge_sweep(*runs, metric, edges=names, progress=False)
    paths = follow_paths(*runs, names, metric, progress=False)
    torch.testing.assert_close(edges.values, paths.values, atol=2e-5, rtol=1e-4)
    some = path_patch(*runs, "L1H0.k", metric, senders=["L0H2"], progress=False)
    torch.testing.assert_close(some.values[:, 0], edges.values[:, 1], atol=2e-5, rtol=1e-4)


def test_a_path_is_nested_edges(case):
    """The last node's answer, worked out with hooks, given to the output alone."""
    metric = patching.logit(case.target)
    runs = (case.model, case.clean, case.corrupted)
    found = follow_paths(*runs, ["L0H1->L1H2.v->output"], metric, progress=False).values[:, 0]
    graph = component_graph(case.model)
    first = graph.edges[int(graph.edge_numbers(["L0H1->L1H2.v"])[0])]
    kept = {}

    def keep(z, hook):
        kept["z"] = z.clone()

    with case.model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", keep)]):
        patched_output(*runs, first)
    here, _ = both_runs(case)
    z = here.z[1].clone()
    z[:, :, 2] = kept["z"][:, :, 2]
    there = type(here)(**{**vars(here), "z": (here.z[0], z)})
    mask = graph.mask(graph.edge_numbers(["L1H2->output"]))
    with torch.no_grad():
        (out,) = run_edge_sets(case.model, graph, here, there, mask[None])
    torch.testing.assert_close(found, metric(out)[0], atol=2e-5, rtol=1e-4)


def test_a_metric_of_your_own_and_padding(pre_norm):
    case = pre_norm
    mask = torch.arange(10)[None] < torch.tensor([10, 8, 6])[:, None]
    options = {"clean_mask": mask, "corrupted_mask": mask, "progress": False}
    metric = patching.logit(case.target)
    runs = (case.model, case.clean, case.corrupted)
    named = edge_sweep(*runs, metric, **options)
    index = torch.arange(3)
    own = edge_sweep(*runs, lambda out: out[index, case.target], **options)
    torch.testing.assert_close(named.values, own.values)
    assert own.metric == "metric"
    # Nothing is heard of a padded position.
    effects = dict(zip(named.coords["edge"], named.effect().T, strict=True))
    assert effects["pos9->L0H0.v"][1:].abs().max() < 1e-6
    assert effects["pos7->L0H0.v"][2].abs() < 1e-6 < effects["pos7->L0H0.v"][1].abs()


def test_padding_that_differs_within_a_pair_is_refused(pre_norm):
    case = pre_norm
    mask = torch.arange(10)[None] < torch.tensor([10, 8, 6])[:, None]
    with pytest.raises(ArgumentError, match="observed at the same samples, and the masks differ"):
        edge_sweep(
            case.model,
            case.clean,
            case.corrupted,
            patching.logit(case.target),
            clean_mask=mask,
            progress=False,
        )


def test_errors_name_what_is_wrong(pre_norm):
    case, metric = pre_norm, patching.logit(pre_norm.target)
    runs = (case.model, case.clean, case.corrupted)
    with pytest.raises(UnknownSiteError, match=r"did you mean 'L0H1->L1H0.k'"):
        edge_sweep(*runs, metric, edges=["L0H1->L1H0.kk"], progress=False)
    with pytest.raises(ArgumentError, match=r"try edges=\('L0H1->output',\)"):
        edge_sweep(*runs, metric, edges="L0H1->output", progress=False)
    with pytest.raises(ArgumentError, match="steps.*-1"):
        edge_attribution(*runs, metric, steps=-1)
    with pytest.raises(ArgumentError, match="along as 'inputs' or 'edges'"):
        edge_attribution(*runs, metric, along="sideways")
    with pytest.raises(SeriesShapeError, match="differentiable value per pair"):
        edge_attribution(*runs, lambda out: out.argmax(-1).float(), progress=False)
    with pytest.raises(UnknownSiteError, match="A head's queries, keys and values"):
        path_patch(*runs, "L7H0.k", metric)
    with pytest.raises(ArgumentError, match="nothing goes back in a model"):
        path_patch(*runs, "L0H0.k", metric, senders="L1H0")
    with pytest.raises(ArgumentError, match="goes back"):
        follow_paths(*runs, ["L1H0->L0H0.k"], metric)
    with pytest.raises(ArgumentError, match="at least two nodes"):
        follow_paths(*runs, ["L1H0"], metric)
    with pytest.raises(UnknownSiteError, match="positions=True"):
        follow_paths(*runs, ["pos3->output"], metric, positions=False)
    case.model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x)
    with pytest.raises(HookError, match="reset_hooks"):
        edge_sweep(*runs, metric, progress=False)


def test_a_model_with_connections_that_the_graph_lacks_is_refused(pre_norm):
    case = pre_norm
    block = case.model.blocks[1]
    attend = block.attend

    def shortcut(resid_pre, state):  # the head's output also depends on what no port carries
        return attend(resid_pre, state) + resid_pre.roll(1, 1)

    block.attend = shortcut
    with pytest.raises(TstlensError, match="something in this model connects components"):
        edge_sweep(
            case.model,
            case.clean,
            case.corrupted,
            patching.logit(case.target),
            progress=False,
        )
