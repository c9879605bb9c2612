"""The codebook by itself: which codes, what they add up to, and every gradient."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from scipy.spatial import cKDTree

from tstlens.codebooks import Codebook, CodebookConfig
from tstlens.errors import ArgumentError, SeriesShapeError

SIMILARITIES = ("cosine", "inner_product", "euclidean")


def x_of(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def brute_force(book, x):
    """Codes and their sum, one activation and one group at a time, in plain numpy."""
    cfg, table = book.cfg, book.table.detach().double().numpy()
    ids, sums = [], []
    for row in x.reshape(-1, cfg.d_in).double().numpy():
        for group, part in enumerate(row.reshape(cfg.n_groups, -1)):
            mean, scale = 0.0, 1.0
            if cfg.normalize:
                mean, scale = part.mean(), np.sqrt(part.var() + 1e-5)
            seen = (part - mean) / scale
            inner = [float(seen @ code) for code in table[group]]
            likeness = {
                "inner_product": inner,
                "cosine": [
                    i / np.linalg.norm(seen) / np.linalg.norm(code)
                    for i, code in zip(inner, table[group], strict=True)
                ],
                "euclidean": [-np.sum((seen - cfg.k * code) ** 2) for code in table[group]],
            }[cfg.similarity]
            chosen = np.argsort(likeness)[::-1][: cfg.k]
            ids.append(chosen)
            sums.append(sum(table[group][code] for code in chosen) * scale + mean)
    shape = x.shape[:-1]
    ids = np.array(ids).reshape(*shape, cfg.n_groups, cfg.k)
    return ids[..., 0, :] if cfg.n_groups == 1 else ids, np.array(sums).reshape(x.shape)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("k", "n_groups"), [(1, 1), (3, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_codes_and_their_sum_are_those_of_a_plain_loop(similarity, k, n_groups, normalize):
    book = Codebook(
        CodebookConfig(
            d_in=8, n_codes=16, k=k, n_groups=n_groups, similarity=similarity, normalize=normalize
        )
    )
    x = 3 * x_of(5, 7, 8) + 1
    ids, sums = brute_force(book, x)
    snap = book.trace(x)
    np.testing.assert_array_equal(book.ids(snap.acts, snap.similarities).numpy(), ids)
    np.testing.assert_allclose(snap.output.detach().numpy(), sums, rtol=1e-4, atol=1e-5)
    acts = book.encode(x)
    assert acts.shape == (5, 7, n_groups * 16) and set(acts.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(acts, snap.acts)
    decoded = book.decode(acts)
    torch.testing.assert_close(decoded, snap.output)
    torch.testing.assert_close(book.decode(acts, given=x), decoded)
    if not normalize:
        torch.testing.assert_close(acts @ book.W_dec, decoded)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_what_is_normalised_and_not_put_back_is_the_sum_of_codes(n_groups, tmp_path):
    """As layer norm without weights in front of a codebook that normalises nothing."""
    options = {"d_in": 8, "n_codes": 16, "k": 2, "n_groups": n_groups}
    book = Codebook(CodebookConfig(**options, normalize=True, restore=False))
    plain, x = Codebook(CodebookConfig(**options)), 3 * x_of(5, 7, 8) + 1
    parts = x.unflatten(-1, (n_groups, -1))
    normalised = torch.nn.functional.layer_norm(parts, parts.shape[-1:]).flatten(-2)
    snap, expected = book.trace(x), plain.trace(normalised)
    assert torch.equal(snap.acts, expected.acts)
    torch.testing.assert_close(snap.output, expected.output)
    torch.testing.assert_close(book.decode(book.encode(x)), expected.output)  # needs no statistics
    leaf = x.clone().requires_grad_()
    book(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))  # straight through, as without
    book.save_model(tmp_path)
    assert not SAE.load_from_disk(tmp_path).cfg.restore


@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_one_euclidean_code_is_the_nearest_neighbour(shift):
    book = Codebook(CodebookConfig(d_in=6, n_codes=200, similarity="euclidean"))
    with torch.no_grad():
        book.table += shift
    x = x_of(3000, 6) + shift
    _, nearest = cKDTree(book.table[0].detach().numpy()).query(x.numpy())
    np.testing.assert_array_equal(book.ids(book.encode(x))[:, 0].numpy(), nearest)


@pytest.mark.parametrize("mode", ["task", "reconstruction", "both"])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradients_are_those_of_a_smooth_reference(mode, normalize):
    """With the codes held fixed the output is a smooth function, so finite differences apply.

    Straight through: the reference adds x less what x is, whose derivative is the identity.
    """
    cfg = CodebookConfig(
        d_in=6, n_codes=5, k=2, n_groups=2, normalize=normalize, gradient=mode, dtype="float64"
    )
    book, x = Codebook(cfg), x_of(4, 6, dtype=torch.float64)
    weight = x_of(4, 6, seed=5, dtype=torch.float64)
    acts = book.encode(x).detach().unflatten(-1, (2, 5))
    parts = x.unflatten(-1, (2, 3))
    mean, scale = torch.zeros(()), torch.ones(())
    if normalize:
        mean = parts.mean(-1, keepdim=True)
        scale = (parts.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    def reference(moved, table, hot):
        summed = torch.einsum("ngc,gcd->ngd", hot, table) * scale + mean
        return ((summed.flatten(-2) + (moved - x)) * weight).sin().sum()

    def differences(which):
        inputs = [x.clone(), book.table.detach().clone(), acts.clone()]
        found = torch.zeros_like(inputs[which])
        for index in np.ndindex(*found.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [tensor.clone() for tensor in inputs]
                moved[which][index] += step
                ends.append(reference(*moved))
            found[index] = (ends[0] - ends[1]) / 2e-6
        return found

    given, kept = x.clone().requires_grad_(), {}
    book.hook_sae_acts_post.add_hook(lambda g, hook: kept.update(post=g.clone()), dir="bwd")
    book.hook_sae_acts_pre.add_hook(lambda g, hook: kept.update(pre=g.clone()), dir="bwd")
    (book.snap(given) * weight).sin().sum().backward()
    torch.testing.assert_close(given.grad, differences(0), rtol=1e-5, atol=1e-7)
    post = differences(2).flatten(-2)
    torch.testing.assert_close(kept["post"], post, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept["pre"], post, rtol=1e-5, atol=1e-7)
    if mode == "reconstruction":
        assert book.table.grad is None
    else:
        torch.testing.assert_close(book.table.grad, differences(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("mode", ["task", "reconstruction", "both"])
def test_a_small_case_worked_out_by_hand(mode, loss_scale):
    """x = W a with a = (1, 2), W = I; codes (1, 0) and (0, 3); the second is chosen (cosine).

    Task loss sum(c * out), c = (5, 7): d/dx = c (straight through), d/dcode = c.
    Reconstruction mean((code - x)^2) = ((0 - 1)^2 + (3 - 2)^2) / 2: d/dcode = code - x = (-1, 1).
    Commitment, the same with x alone moving: d/dx = x - code = (1, -1). dL/dW = dL/dx a^T.
    """
    book = Codebook(CodebookConfig(d_in=2, n_codes=2, gradient=mode))
    with torch.no_grad():
        book.table.copy_(torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]))
    upstream = torch.nn.Parameter(torch.eye(2))
    a, c = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])
    snap = book.trace((upstream @ a)[None])
    assert snap.output.tolist() == [[0.0, 3.0]]
    terms = book.losses(snap)
    loss = (snap.output * c).sum() + terms["reconstruction"] + 0.5 * terms["commitment"]
    (loss_scale * loss).backward()
    by_task, by_reconstruction = c, torch.tensor([-1.0, 1.0])
    expected = {
        "task": by_task,
        "reconstruction": by_reconstruction,
        "both": by_task + by_reconstruction,
    }[mode]
    table = torch.stack([torch.zeros(2), expected])[None]
    torch.testing.assert_close(book.table.grad / loss_scale, table)
    at_x = c + 0.5 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(upstream.grad / loss_scale, torch.outer(at_x, a))


def test_gradient_modes_belong_to_one_codebook_alone():
    first = Codebook(CodebookConfig(d_in=4, n_codes=6, gradient="task"))
    second = Codebook(CodebookConfig(d_in=4, n_codes=6, gradient="reconstruction"))
    (first.snap(x_of(3, 4)).sum() + second.snap(x_of(3, 4)).sum()).backward()
    assert first.table.grad is not None and second.table.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_edits_of_codes_and_of_similarities_change_the_output(training):
    book = Codebook(CodebookConfig(d_in=4, n_codes=6)).train(training)
    x, only = x_of(3, 4), torch.nn.functional.one_hot(torch.tensor([5, 1, 2]), 6).float()
    book.hook_sae_acts_post.add_hook(lambda acts, hook: only)
    torch.testing.assert_close(book.snap(x), book.table[0, [5, 1, 2]])
    book.reset_hooks()
    book.hook_sae_acts_pre.add_hook(lambda s, hook: s + 100 * only)
    torch.testing.assert_close(book.snap(x), book.table[0, [5, 1, 2]])
    weights = only.clone().requires_grad_()
    book.reset_hooks()
    book.hook_sae_acts_post.add_hook(lambda acts, hook: weights)
    book.snap(x).sum().backward()
    torch.testing.assert_close(weights.grad, book.table[0].sum(1).expand(3, 6).detach())


def test_a_frozen_codebook_still_gives_gradients_at_its_codes():
    book = Codebook(CodebookConfig(d_in=4, n_codes=6)).requires_grad_(False)
    kept = []
    book.hook_sae_acts_post.add_hook(lambda g, hook: kept.append(g.clone()), dir="bwd")
    book.snap(x_of(3, 4)).sum().backward()
    torch.testing.assert_close(kept[0], book.table[0].sum(1).expand(3, 6))


@pytest.mark.parametrize("k", [1, 4])
def test_sampling_makes_the_table_of_real_activations(k):
    book = Codebook(CodebookConfig(d_in=6, n_codes=10, k=k, n_groups=2))
    x = x_of(30, 6)
    book.sample(x, seed=3)
    again = copy.deepcopy(book).sample(x, seed=3)
    assert torch.equal(book.table, again.table)
    assert not torch.equal(book.table, again.sample(x, seed=4).table)
    for group in range(2):
        parts = {tuple(row) for row in x[:, 3 * group : 3 * group + 3].numpy().round(4)}
        codes = [tuple(row) for row in (k * book.table[group].detach()).numpy().round(4)]
        assert len(set(codes)) == 10 and set(codes) <= parts
    with pytest.raises(ArgumentError, match="at least n_codes=10 activations to draw from, got 9"):
        book.sample(x[:9])


def test_another_k_keeps_what_codes_add_up_to():
    book = Codebook(CodebookConfig(d_in=6, n_codes=10, k=4, similarity="euclidean"))
    similarities = book.trace(x_of(8, 6)).similarities
    book.set_k(1)
    torch.testing.assert_close(book.trace(x_of(8, 6)).similarities, similarities)
    assert book.cfg.k == 1 and book.ids(book.encode(x_of(8, 6))).shape == (8, 1)
    with pytest.raises(ArgumentError, match=r"k in 1..10, got 11"):
        book.set_k(11)


def test_usage_counts_positions_that_count():
    book = Codebook(CodebookConfig(d_in=6, n_codes=5, k=2, n_groups=2))
    acts, keep = book.encode(x_of(4, 7, 6)), torch.rand(4, 7) < 0.6
    ids = book.ids(acts)  # [4, 7, group, k]
    by_hand = np.zeros((2, 5), dtype=int)
    for row, pos in zip(*np.nonzero(keep.numpy()), strict=True):
        for group in range(2):
            for code in ids[row, pos, group]:
                by_hand[group, code] += 1
    np.testing.assert_array_equal(book.usage(acts, keep).numpy(), by_hand)
    assert book.usage(acts).sum() == 4 * 7 * 2 * 2
    assert (book.ids(acts, None, keep)[~keep] == -1).all()


def test_losses_leave_out_what_does_not_count():
    book = Codebook(CodebookConfig(d_in=6, n_codes=5, normalize=True))
    x, keep = x_of(4, 7, 6), torch.rand(4, 7) < 0.6
    other = torch.where(keep[..., None], x, 9 * x_of(4, 7, 6, seed=2))
    terms, moved = (book.losses(book.trace(given), keep) for given in (x, other))
    for name in ("reconstruction", "commitment"):
        assert torch.equal(terms[name], moved[name])
        assert terms[name].item() == pytest.approx(book.losses(book.trace(x[keep]))[name].item())
    with pytest.raises(SeriesShapeError, match=r"keep \[4, 7\], got \[7, 4\]"):
        book.losses(book.trace(x), keep.T)
    with pytest.raises(ArgumentError, match="at least one observed position"):
        book.losses(book.trace(x), torch.zeros(4, 7, dtype=torch.bool))


def test_mixed_precision_gives_the_same_codes():
    book, x = Codebook(CodebookConfig(d_in=32, n_codes=64)), x_of(500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = book.encode(x)
    assert torch.equal(mixed, book.encode(x))


def test_sae_lens_loads_it_in_a_new_process_with_the_same_codes(tmp_path):
    book = Codebook(
        CodebookConfig(d_in=8, n_codes=16, k=2, n_groups=4, similarity="euclidean", normalize=True)
    )
    book.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    x = x_of(20, 8)
    book.save_model(tmp_path / "book")
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, json, numpy, torch, tstlens.codebooks\n"
        "from sae_lens import SAE\n"
        "book = SAE.load_from_disk(sys.argv[1] + '/book')\n"
        "x = torch.from_numpy(numpy.load(sys.argv[1] + '/x.npy'))\n"
        "print(json.dumps([type(book).__name__, book.cfg.metadata.hook_name,"
        " book.ids(book.encode(x)).tolist(), book.snap(x).tolist()]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    out = subprocess.run(run, capture_output=True, text=True, env=environment, check=True).stdout
    kind, hook, ids, snapped = json.loads(out)
    assert (kind, hook) == ("Codebook", "blocks.0.attn.hook_z")
    assert ids == book.ids(book.encode(x)).tolist()
    np.testing.assert_allclose(snapped, book.snap(x).tolist(), rtol=1e-6)
    assert get_sae_class("codebook") == (Codebook, CodebookConfig)
    assert SAE.load_from_disk(tmp_path / "book").cfg == book.cfg


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 20}, "expected k <= n_codes=16, got k=20"),
        ({"n_groups": 3}, "expected n_groups to divide d_in=8, got n_groups=3"),
        ({"similarity": "dot"}, "'inner_product' or 'euclidean', got 'dot'"),
        ({"gradient": "all"}, "'reconstruction' or 'both', got 'all'"),
        ({"d_sae": 17}, "d_sae = n_groups \\* n_codes = 16, got 17"),
        ({"n_codes": 0}, "n_codes as an integer of at least 1, got 0"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='none' only"),
    ],
)
def test_impossible_sizes_are_refused(options, message, no_shape_checks):
    with pytest.raises(ArgumentError, match=message):
        CodebookConfig(**{"d_in": 8, "n_codes": 16, **options})


def test_an_open_config_is_for_add_codebooks():
    with pytest.raises(ArgumentError, match=r"0 asks the hook point: model.add_codebooks"):
        Codebook(CodebookConfig())


def test_what_cannot_be_decoded_or_encoded_says_why(no_shape_checks):
    book = Codebook(CodebookConfig(d_in=8, n_codes=4, normalize=True))
    acts = book.encode(x_of(3, 8))
    book.decode(acts)
    with pytest.raises(ArgumentError, match="needs given="):
        book.decode(acts)
    book.encode(x_of(5, 8))
    with pytest.raises(ArgumentError, match="needs given="):
        book.decode(acts)
    with pytest.raises(SeriesShapeError, match=r"\[..., d_in=8\], got \[3, 7\]"):
        book.encode(x_of(3, 7))
    with pytest.raises(ArgumentError, match="no encoder"):
        book.fold_W_dec_norm()
