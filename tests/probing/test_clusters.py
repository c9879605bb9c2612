"""Clusters against scikit-learn and planted groups; latents ablated against edits by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from tests.probing.made import labelled, small
from tstlens.data import TimeSeriesData
from tstlens.errors import ArgumentError, LabelError
from tstlens.probing import activations, cluster_effect, clusters

HOOK = "blocks.1.hook_resid_post"


class Dictionary(nn.Module):
    """A hand-written dictionary: ReLU on random directions and their opposites."""

    def __init__(self, d_in: int = 8, hook: str = HOOK) -> None:
        super().__init__()
        directions = torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(3))
        q, _ = torch.linalg.qr(directions)
        self.W_dec = nn.Parameter(torch.cat([q, -q]))
        from transformer_lens.hook_points import HookPoint

        self.hook_sae_acts_post = HookPoint()
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook), d_in=d_in)

    def encode(self, x):
        return self.hook_sae_acts_post((x @ self.W_dec.T).relu())

    def decode(self, latents):
        return latents @ self.W_dec


def grouped(n=60, seed=0):
    """Series of three groups that differ in the level of their channels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 3)[torch.randperm(n, generator=generator)]
    series = 0.3 * torch.randn(n, 3, 10, generator=generator)
    series += 4 * torch.eye(3)[labels][:, :, None]
    return TimeSeriesData(series, labels, ("a", "b", "c"), name="groups")


def test_planted_groups_are_found_and_scored_as_scikit_learn_does():
    model, data = small(), grouped()
    found = clusters(model, data, HOOK, n_clusters=3, n_permutations=100)
    points = activations(model, data, HOOK)[HOOK].values[:, 0].mean(1)
    direct = KMeans(3, n_init=10, random_state=0).fit(StandardScaler().fit_transform(points))
    assert adjusted_rand_score(direct.labels_, found.assigned) == pytest.approx(1)
    labels = data.labels.numpy()
    agreement = found.agreement
    assert agreement.ari == pytest.approx(adjusted_rand_score(labels, found.assigned)) and (
        agreement.ami == pytest.approx(adjusted_mutual_info_score(labels, found.assigned))
    )
    assert agreement.ari > 0.95 and agreement.p["ari"] == pytest.approx(1 / 101)
    assert agreement.input_ari > 0.95
    assert found.contingency().to_numpy().sum() == 60


def test_hdbscan_finds_the_number_of_groups_by_itself():
    found = clusters(
        small(), grouped(), HOOK, method="hdbscan", min_cluster_size=8, n_permutations=100
    )
    assert found.n_clusters == 3 and found.agreement.ari > 0.9


@pytest.mark.parametrize("what", ["series", "positions"])
def test_scores_on_random_labels_sit_at_chance(what):
    data = labelled(24, n_classes=4, seed=2)
    model = small()
    p = []
    for seed in range(8):
        shuffled = data.labels[torch.randperm(24, generator=torch.Generator().manual_seed(seed))]
        one = TimeSeriesData(data.series, shuffled, data.class_names)
        found = clusters(model, one, HOOK, n_clusters=4, what=what, n_permutations=100, seed=seed)
        p.append(found.agreement.p["ari"])
        assert abs(found.agreement.null["ami"][0]) < 0.02 or what == "positions"
    assert np.mean(np.array(p) <= 0.05) <= 0.2 and 0.25 < np.mean(p) < 0.75


def test_positions_of_one_series_are_no_independent_evidence():
    """Labels at random, but each series sits in a corner of its own: the null has to know."""
    generator = torch.Generator().manual_seed(0)
    series = 5 * torch.randn(12, 3, 1, generator=generator) + 0.1 * torch.randn(12, 3, 10)
    data = TimeSeriesData(series, torch.arange(12) % 2, ("a", "b"))
    model = small()
    found = clusters(model, data, "embed", n_clusters=4, what="positions", n_permutations=100)
    assert found.agreement.ari > 0.02 or found.agreement.null["ari"][1] > 0.02
    assert found.agreement.p["ari"] > 0.05


def test_padded_positions_are_in_no_cluster():
    data = labelled(24, padded=True)
    found = clusters(small(), data, HOOK, n_clusters=2, what="positions", n_permutations=100)
    assert len(found.assigned) == int(data.mask.sum())
    assert data.mask.numpy()[found.places[:, 0], found.places[:, 2]].all()


def test_medoids_are_nearest_to_the_middle_and_lie_on_the_raw_series():
    found = clusters(small(), grouped(), HOOK, n_clusters=3, what="positions", n_permutations=100)
    table = found.medoids(2)
    assert len(table) == 6 and (table["stop"] - table["start"] == 1).all()
    for cluster in range(3):
        own = found.points[found.assigned == cluster]
        nearest = np.linalg.norm(own - own.mean(0), axis=1).min()
        first = found.points[found.members(cluster)[0]]
        assert np.linalg.norm(first - own.mean(0)) == pytest.approx(nearest)
        rows = table[table["cluster"] == cluster]
        assert rows["series"].nunique() == 2
        place = found.places[found.members(cluster)[0]]
        assert (rows.iloc[0]["series"], rows.iloc[0]["pos"]) == (place[0], place[2])


def test_latents_that_rise_and_fall_together_are_one_cluster():
    class Copies(Dictionary):
        def encode(self, x):
            latents = (x @ self.W_dec.T).relu()[..., :4]
            doubled = torch.cat([latents, 3 * latents, 0 * latents[..., :1]], -1)
            return self.hook_sae_acts_post(doubled)

        def decode(self, latents):
            return latents[..., :4] @ self.W_dec[:4]

    found = clusters(small(), grouped(), sae=Copies(), what="latents", n_clusters=4)
    assert found.places[:, 0].tolist() == list(range(8))  # the ninth never varies
    assert (found.assigned[:4] == found.assigned[4:]).all() and len(set(found.assigned[:4])) == 4
    assert found.profile.shape == (4, 3) and found.agreement is None


@pytest.mark.parametrize("mode", ["ablate", "keep"])
def test_a_clusters_latents_are_edited_inside_the_model(mode):
    model, sae = small(), Dictionary()
    data = TimeSeriesData(grouped().series, grouped().labels, ("a", "b", "c", "d"))
    found = clusters(model, data, sae=sae, what="latents", n_clusters=3)
    effect = cluster_effect(model, sae, data, found, mode=mode, n_draws=3, progress=False)
    for cluster in range(3):
        own = torch.tensor(found.places[found.assigned == cluster, 0])

        def edit(stream, hook, own=own):
            latents = (stream @ sae.W_dec.T).relu()
            chosen = torch.zeros(16)
            chosen[own] = 1
            if mode == "keep":
                return (latents * chosen) @ sae.W_dec
            return stream - (latents * chosen) @ sae.W_dec

        with torch.no_grad():
            output = model.run_with_hooks(data.series, fwd_hooks=[(HOOK, edit)])
        score = output.double().log_softmax(1).gather(1, data.labels[:, None])[:, 0]
        assert effect.value[cluster] == pytest.approx(float(score.mean()), abs=1e-5)
        by_class = [float(score[data.labels == index].mean()) for index in range(3)]
        np.testing.assert_allclose(effect.by_class[cluster][:3], by_class, atol=1e-5)
    assert effect.sizes == tuple(found.sizes) and effect.random_value.shape == (3, 3)
    assert not model.acts_to_saes  # the dictionary is out again
    with torch.no_grad():
        plain = model(data.series).double().log_softmax(1).gather(1, data.labels[:, None]).mean()
    # The directions and their opposites reconstruct everything, so either base is the model itself.
    assert effect.full[0] == pytest.approx(float(plain), abs=1e-5)


def test_a_cluster_that_holds_everything_is_keeping_or_losing_everything():
    model, sae = small(), Dictionary()
    data = TimeSeriesData(grouped().series, grouped().labels, ("a", "b", "c", "d"))
    found = clusters(model, data, sae=sae, what="latents", n_clusters=1)
    kept = cluster_effect(model, sae, data, found, mode="keep", n_draws=1, progress=False)
    gone = cluster_effect(model, sae, data, found, mode="ablate", n_draws=1, progress=False)
    assert kept.value[0] == pytest.approx(kept.full[0], abs=1e-6)
    assert gone.value[0] == pytest.approx(gone.none[0], abs=1e-6)
    assert kept.p[0] == gone.p[0] == 1  # random groups of that size are the same group


def test_what_is_wrong_is_said():
    model, data, sae = small(), grouped(), Dictionary()
    with pytest.raises(ArgumentError, match="give either hook=, or sae="):
        clusters(model, data)
    with pytest.raises(ArgumentError, match="expected one hook point, got 'resid_post'"):
        clusters(model, data, "resid_post")
    with pytest.raises(ArgumentError, match=r"expected n_clusters in 1..60, got 61"):
        clusters(model, data, HOOK, n_clusters=61)
    of_units = clusters(model, data, HOOK, what="latents", n_clusters=2)
    with pytest.raises(ArgumentError, match="expected clusters of a dictionary's latents"):
        cluster_effect(model, sae, data, of_units, progress=False)
    found = clusters(model, data, sae=sae, what="latents", n_clusters=2)
    with pytest.raises(LabelError, match="or metric="):
        cluster_effect(model, sae, TimeSeriesData(data.series), found, progress=False)
    unlabelled = clusters(model, TimeSeriesData(data.series), HOOK, n_clusters=2)
    with pytest.raises(ArgumentError, match="have no labels"):
        unlabelled.contingency()


def test_figures():
    model, data, sae = small(), grouped(), Dictionary()
    found = clusters(model, data, HOOK, n_clusters=3, n_permutations=100)
    z = np.array(found.figure().data[0].z, dtype=float)
    np.testing.assert_allclose(z.sum(1), 1)
    assert z.argmax(1).tolist() == [0, 1, 2]  # ordered to a diagonal
    assert list(found.figure().data[0].x) == ["a", "b", "c"]
    numbered = TimeSeriesData(data.series, data.labels, ("1", "2", "3"))
    drawn = clusters(model, numbered, HOOK, n_clusters=3, n_permutations=100).figure()
    assert list(drawn.data[0].x) == list(drawn.layout.xaxis.tickvals) == [0, 1, 2]
    assert list(drawn.layout.xaxis.ticktext) == ["1", "2", "3"]
    assert len(found.figure(kind="windows").data) == 9  # three medoids of three channels
    latents = clusters(model, data, sae=sae, what="latents", n_clusters=2)
    np.testing.assert_allclose(latents.figure().data[0].z, latents.profile)
    named = TimeSeriesData(data.series, data.labels, ("a", "b", "c", "d"))
    effect = cluster_effect(model, sae, named, latents, n_draws=2, progress=False)
    np.testing.assert_allclose(effect.figure().data[-1].x, effect.value)


@pytest.mark.parametrize("what", ["series", "positions", "latents"])
def test_the_map_of_samples_is_scikit_learns_principal_components(what):
    from sklearn.decomposition import PCA

    model, data = small(), labelled(30)
    sae = Dictionary() if what == "latents" else None
    hook = None if sae is not None else HOOK
    found = clusters(model, data, hook, sae=sae, what=what, n_clusters=3, n_permutations=100)
    figure = found.figure(kind="pca")
    expected = PCA(2).fit(found.points)
    place = expected.transform(found.points)
    groups = found.assigned if found.labels is None else found.labels
    for trace, group in zip(figure.data, np.unique(groups), strict=True):
        for drawn, component in zip((trace.x, trace.y), place[groups == group].T, strict=True):
            sign = np.sign(np.dot(drawn, component))
            np.testing.assert_allclose(np.asarray(drawn) * sign, component, atol=1e-4)
    share = expected.explained_variance_ratio_
    assert f"({share[0]:.0%} of variance)" in figure.layout.xaxis.title.text
    numbers = [note.text for note in figure.layout.annotations]
    assert [f"<b>{cluster}</b>" for cluster in range(found.n_clusters)] == numbers
