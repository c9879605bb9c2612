"""Codebooks in a model: put in, switched off, taken out; padding; wrong places; intervened on."""

from __future__ import annotations

import copy

import pytest
import torch
from sae_lens import SAE
from torch import nn

from tstlens import load_dataset
from tstlens.codebooks import CodebookConfig
from tstlens.errors import ArgumentError, HookError, SeriesShapeError, UnknownHookError
from tstlens.model import HookedTST
from tstlens.patching import Site, log_prob, sweep

MLP_OUT, Z, HIDDEN = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"
POST, PRE = ".hook_sae_acts_post", ".hook_sae_acts_pre"

# hook point -> options of a codebook there
PLACES = {
    "hook_embed": {},
    "blocks.0.hook_resid_pre": {"normalize": True},
    "blocks.1.hook_resid_mid": {"k": 3},
    "blocks.1.hook_resid_post": {"n_groups": 4},
    "blocks.0.hook_normalized_resid_post": {},
    "blocks.0.hook_attn_out": {"similarity": "euclidean"},
    MLP_OUT: {"k": 2, "normalize": True},
    HIDDEN: {"d_in": 12},
    "blocks.0.attn.hook_q": {"n_groups": 2},
    "blocks.1.attn.hook_k": {"d_in": 4},
    "blocks.0.attn.hook_v": {"n_groups": 4},
    Z: {"n_groups": 2, "k": 2, "normalize": True},
    "blocks.0.ln1.hook_normalized": {},
    "head.hook_pooled": {},
}


def flat(x, book):
    """An activation as the codebook sees it: heads joined where it reads all of them."""
    return x.flatten(-2) if x.shape[-1] != book.cfg.d_in else x


@pytest.mark.parametrize("hook", PLACES)
def test_it_stands_for_the_activation_and_goes_without_a_trace(
    make_model, make_book, series, mask, hook
):
    model, book = make_model(), make_book(**PLACES[hook])
    plain = model(series, mask=mask)
    _, cache = model.run_with_cache(series, mask=mask)
    expected = model.run_with_hooks(
        series,
        mask=mask,
        fwd_hooks=[(hook, lambda x, hook: book.snap(flat(x, book)).view(x.shape))],
    )
    model.add_codebook(book, hook)
    out, coded = model.run_with_cache(series, mask=mask)
    torch.testing.assert_close(out, expected)
    assert torch.equal(coded[hook + POST], book.encode(flat(cache[hook], book)))
    assert not torch.equal(model(series, mask=mask), plain)
    with model.snapping(False):
        assert torch.equal(model(series, mask=mask), plain)
        with model.snapping(True, hook):
            torch.testing.assert_close(model(series, mask=mask), out)
        assert torch.equal(model(series, mask=mask), plain)
        with pytest.raises(HookError, match=r"snapping is off: model.set_snapping\(True\)"):
            model.run_with_cache(series, names_filter=hook + POST)
        with pytest.raises(HookError, match="is switched off"):
            model.code_ids(series)
    torch.testing.assert_close(model(series, mask=mask), out)
    model.reset_codebooks()
    assert torch.equal(model(series, mask=mask), plain) and not model.acts_to_codebooks


def test_the_sum_of_attention_and_mlp_is_what_the_block_adds(make_model, make_book, series):
    model, hook = make_model(norm_position="pre"), "blocks.1.hook_attn_mlp_sum"
    _, cache = model.run_with_cache(series)
    plain = model(series)
    model.set_use_attn_mlp_sum(True)
    assert torch.equal(model(series), plain)
    _, after = model.run_with_cache(series)
    added = cache["attn_out", 1] + cache["mlp_out", 1]
    torch.testing.assert_close(after[hook], added, rtol=1e-4, atol=1e-5)
    book = make_book()
    snapped = cache["resid_pre", 1] + book.snap(added)
    expected = model.run_with_hooks(
        series, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: snapped)]
    )
    torch.testing.assert_close(
        model.run_with_codebooks(series, codebooks={hook: book}), expected, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model(series), plain)
    with pytest.raises(UnknownHookError, match="a post-norm model normalises the stream between"):
        make_model().add_codebook(make_book(), hook)


def test_contexts_restore_what_was_there(model, make_book, series):
    plain, first = model(series), make_book()
    model.add_codebook(first, MLP_OUT)
    with_first = model(series)
    second, third = make_book(k=2), make_book(d_in=12)
    with model.codebooks({MLP_OUT: second, HIDDEN: third}):
        both = model(series)
        assert model.acts_to_codebooks == {MLP_OUT: second, HIDDEN: third}
    assert not torch.equal(both, with_first)
    assert torch.equal(model(series), with_first)
    out, cache = model.run_with_cache_with_codebooks(series, codebooks=[second, third])
    torch.testing.assert_close(out, both)
    assert MLP_OUT + POST in cache
    assert torch.equal(model.run_with_codebooks(series, codebooks=[second, third]), both)
    with pytest.raises(RuntimeError), model.codebooks(third):
        raise RuntimeError
    assert model.acts_to_codebooks == {MLP_OUT: first}
    model.reset_codebooks(MLP_OUT)
    assert torch.equal(model(series), plain)
    with pytest.raises(UnknownHookError, match="No codebook is spliced in there"):
        model.reset_codebooks(MLP_OUT)


def test_bypassed_positions_keep_their_activation(model, make_book, series):
    _, plain = model.run_with_cache(series)
    model.add_codebook(make_book(), MLP_OUT, bypass=(0, -1))
    _, cache = model.run_with_cache(series)
    same = (cache[MLP_OUT + ".hook_sae_output"] == plain[MLP_OUT]).all(-1)
    assert same[:, [0, -1]].all() and not same[:, 1:-1].any()
    ids = model.code_ids(series)[MLP_OUT]
    assert (ids[:, [0, -1]] == -1).all() and (ids[:, 1:-1] >= 0).all()


def test_with_the_error_term_only_an_edit_changes_the_output(model, make_book, series):
    plain = model(series)
    model.add_codebook(make_book(normalize=True), MLP_OUT, use_error_term=True)
    torch.testing.assert_close(model(series), plain)
    with model.force_codes({MLP_OUT: 3}):
        assert not torch.allclose(model(series), plain)


def test_one_config_makes_codebooks_for_several_places(model, series, tmp_path):
    config = CodebookConfig(n_codes=16, k=2, n_groups=0)
    made = model.add_codebooks(config, [MLP_OUT, Z, HIDDEN])
    sizes = {hook: (book.cfg.d_in, book.n_groups) for hook, book in made.items()}
    assert sizes == {MLP_OUT: (8, 1), Z: (8, 2), HIDDEN: (12, 1)} and config.d_in == 0
    ids = model.code_ids(series)
    assert {hook: tuple(found.shape) for hook, found in ids.items()} == {
        MLP_OUT: (6, 10, 2),
        Z: (6, 10, 2, 2),
        HIDDEN: (6, 10, 2),
    }
    out = model(series)
    model.save_pretrained(tmp_path / "model")
    again = HookedTST.from_pretrained(tmp_path / "model")
    for hook in made:
        again.add_codebook(SAE.load_from_disk(tmp_path / "model" / "saes" / hook))
    assert torch.equal(again(series), out)
    loaded = again.code_ids(series)
    assert all(torch.equal(loaded[hook], ids[hook]) for hook in made)
    assert not model.get_submodule("splices").training
    assert model.train().acts_to_codebooks[Z].training


def test_more_padding_changes_no_code_no_loss_and_no_count(make_model, make_book):
    model = make_model(n_time=None, positions="sinusoidal")
    hooks = {MLP_OUT: make_book(normalize=True), Z: make_book(n_groups=2), HIDDEN: make_book(12)}
    series = torch.randn(5, 3, 10)
    mask = torch.arange(10)[None] < torch.tensor([10, 7, 4, 10, 6])[:, None]
    longer = torch.cat([series, 100 * torch.randn(5, 3, 6)], 2)
    longer[:, :, :10][~mask[:, None].expand(-1, 3, -1)] = 55.0
    longer_mask = torch.cat([mask, torch.zeros(5, 6, dtype=torch.bool)], 1)
    found = []
    with model.codebooks(hooks):
        for given, observed in ((series, mask), (longer, longer_mask)):
            ids = model.code_ids(given, observed)
            with model.watch_codes() as seen:
                out = model(given, mask=observed)
            losses = {h: book.losses(seen[h].snap, seen[h].keep) for h, book in hooks.items()}
            counts = {h: book.usage(seen[h].snap.acts, seen[h].keep) for h, book in hooks.items()}
            found.append((ids, out, losses, counts))
    (ids, out, losses, counts), (more_ids, more_out, more_losses, more_counts) = found
    torch.testing.assert_close(more_out, out)
    for hook in hooks:
        assert torch.equal(more_ids[hook][:, :10], ids[hook])
        assert (more_ids[hook][:, 10:] == -1).all() and (ids[hook][~mask] == -1).all()
        assert torch.equal(more_counts[hook], counts[hook])
        assert (counts[hook].sum(-1) == int(mask.sum())).all()
        for name, value in losses[hook].items():
            torch.testing.assert_close(more_losses[hook][name], value)


def test_every_channel_by_itself_has_codes_of_its_own(per_channel_model, make_book, series):
    per_channel_model.add_codebook(make_book(), MLP_OUT)
    ids = per_channel_model.code_ids(series)[MLP_OUT]
    _, cache = per_channel_model.run_with_cache(series)
    assert ids.shape == (18, 5, 1)
    assert torch.equal(cache[MLP_OUT + POST].argmax(-1), ids[..., 0])


@pytest.mark.parametrize(
    ("hook", "options", "error", "message"),
    [
        ("blocks.5.hook_mlp_out", {}, UnknownHookError, "unknown hook 'blocks.5.hook_mlp_out'"),
        (MLP_OUT, {"d_in": 12}, ArgumentError, r"width d_model=8 at .*, got d_in=12"),
        (HIDDEN, {}, ArgumentError, r"width d_mlp=12 at .*, got d_in=8"),
        (Z, {"d_in": 12}, ArgumentError, r"d_head=4 or all heads=8 at .*, got d_in=12"),
        ("blocks.0.attn.hook_pattern", {}, HookError, "no feature axis"),
        (None, {}, ArgumentError, "does not know its hook point: give hook="),
    ],
)
def test_a_wrong_place_is_refused(model, make_book, series, hook, options, error, message):
    plain = model(series)
    with pytest.raises(error, match=message):
        model.add_codebook(make_book(**options), hook)
    assert torch.equal(model(series), plain)


def test_a_group_across_two_heads_is_refused(make_model, make_book):
    model = make_model(d_model=12, n_heads=3)
    with pytest.raises(ArgumentError, match=r"multiple of n_heads=3 .* got n_groups=2"):
        model.add_codebook(make_book(12, n_groups=2), Z)
    model.add_codebook(make_book(12, n_groups=6), Z)


def test_a_codebook_of_another_hook_point_is_refused(model, make_book):
    book = make_book()
    model.add_codebook(book, MLP_OUT)
    model.reset_codebooks()
    with pytest.raises(HookError, match=r"belongs to blocks.0.hook_mlp_out.*hook_name = None"):
        model.add_codebook(book, "blocks.1.hook_mlp_out")
    model.add_codebook(book)
    assert list(model.acts_to_codebooks) == [MLP_OUT]
    with pytest.raises(ArgumentError, match="expected a codebook, got a Linear"):
        model.add_codebook(nn.Linear(8, 8), MLP_OUT)


# --- interventions ---------------------------------------------------------------------------


def set_codes(pos, tables, weights, n_codes=16):
    """A plain hook: at these positions and tables, these weights of the codes."""

    def edit(acts, hook):
        acts = acts.clone()
        for table in tables:
            for p in pos:
                acts[:, p, table * n_codes : (table + 1) * n_codes] = weights
        return acts

    return edit


def one_hot(*codes, weight=1.0):
    weights = torch.zeros(16)
    weights[list(codes)] = weight
    return weights


@pytest.mark.parametrize(
    ("hook", "options", "where", "tables"),
    [
        (MLP_OUT, {}, {}, [0]),
        (MLP_OUT, {"normalize": True}, {}, [0]),
        (Z, {"n_groups": 2}, {"head": 1}, [1]),
        (Z, {"n_groups": 4}, {"head": 1}, [2, 3]),
        (Z, {"n_groups": 2}, {"group": [0, 1]}, [0, 1]),
    ],
)
@pytest.mark.parametrize("others", ["keep", "drop"])
def test_forced_codes_equal_a_plain_hook(
    model, make_book, series, hook, options, where, tables, others
):
    model.add_codebook(make_book(**options), hook)
    plain = model(series)
    edit = set_codes([2, 3, 9], tables, one_hot(5))
    expected = model.run_with_hooks(series, fwd_hooks=[(hook + POST, edit)])
    with model.force_codes({hook: 5}, pos=[2, 3, -1], others=others, **where):
        torch.testing.assert_close(model(series), expected)
        ids = model.code_ids(series)[hook].view(6, 10, -1)
        assert (ids[:, [2, 3, 9]][..., tables] == 5).all()
    assert torch.equal(model(series), plain) and not torch.allclose(expected, plain)


def test_a_forced_code_takes_the_place_of_the_least_similar(model, make_book, series):
    model.add_codebook(make_book(k=3), MLP_OUT)
    before = model.code_ids(series)[MLP_OUT]
    with model.force_codes({MLP_OUT: 5}):
        after = model.code_ids(series)[MLP_OUT]
    for row in range(6):
        for pos in range(10):
            had = before[row, pos].tolist()
            kept = [code for code in had if code != 5][:2]
            assert after[row, pos].tolist() == [5, *kept]
    expected = model.run_with_hooks(
        series, fwd_hooks=[(MLP_OUT + POST, set_codes(range(10), [0], one_hot(5, 7, weight=1.5)))]
    )
    with model.force_codes({MLP_OUT: [5, 7]}, others="drop"):
        torch.testing.assert_close(model(series), expected)


def test_heads_that_share_a_table_are_forced_one_by_one(model, make_book, series):
    book = make_book(d_in=4)
    model.add_codebook(book, Z)
    before = model.code_ids(series)[Z]  # [row, pos, head, k]
    assert before.shape == (6, 10, 2, 1)
    with model.force_codes({Z: 5}, head=1):
        after = model.code_ids(series)[Z]
    assert torch.equal(after[:, :, 0], before[:, :, 0]) and (after[:, :, 1] == 5).all()


def test_positions_may_differ_between_rows(model, make_book, series):
    model.add_codebook(make_book(), MLP_OUT)
    before = model.code_ids(series)[MLP_OUT][..., 0]
    where = torch.rand(6, 10) < 0.5
    with model.force_codes({MLP_OUT: 5}, pos=where):
        after = model.code_ids(series)[MLP_OUT][..., 0]
        with pytest.raises(SeriesShapeError, match=r"pos as bool \[row=3, pos=10\]"):
            model(series[:3])
    assert torch.equal(after, torch.where(where, 5, before))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_banned_code_gives_way_to_the_next_nearest(model, make_book, series, k, similarity):
    book = make_book(k=k, similarity=similarity)
    _, cache = model.run_with_cache(series)
    model.add_codebook(book, MLP_OUT)
    similarities = book.similarities(cache[MLP_OUT].unsqueeze(-2)).squeeze(-2).detach()
    usage = book.usage(book.encode(cache[MLP_OUT]))[0]
    banned = usage.topk(3).indices.tolist()
    with model.ban_codes({MLP_OUT: banned}):
        ids = model.code_ids(series)[MLP_OUT]
    for row in range(6):
        for pos in range(10):
            order = similarities[row, pos].argsort(descending=True).tolist()
            assert ids[row, pos].tolist() == [code for code in order if code not in banned][:k]
    zeroed = book.encode(cache[MLP_OUT]).clone()
    zeroed[..., banned] = 0
    expected = model.run_with_hooks(series, fwd_hooks=[(MLP_OUT + POST, lambda x, hook: zeroed)])
    with model.ban_codes({MLP_OUT: banned}, fill="zero"):
        torch.testing.assert_close(model(series), expected)
        assert (model.code_ids(series)[MLP_OUT] == -1).any()


@pytest.mark.parametrize("where", [{}, {"pos": [1, 4]}, {"pos": [1, 4], "source_pos": [7, 2]}])
def test_swapped_codes_are_those_of_the_other_series(model, make_book, series, where):
    model.add_codebook(make_book(k=2), MLP_OUT)
    model.add_codebook(make_book(n_groups=2), Z)
    other = torch.randn(6, 3, 10)
    before, theirs = (model.code_ids(given)[MLP_OUT] for given in (series, other))
    plain = model(series)
    expected = before.clone()
    to = where.get("pos", list(range(10)))
    expected[:, to] = theirs[:, where.get("source_pos", to)]
    with model.swap_codes(other, MLP_OUT, **where):
        swapped = model.code_ids(series)
        assert torch.equal(swapped[MLP_OUT].sort(-1).values, expected.sort(-1).values)
    assert torch.equal(model(series), plain)
    with model.swap_codes(other, **where):
        out = model(series)
    with model.swap_codes(other[:1], **where):
        one = model(series)
    again = torch.stack(
        [
            _swapped_alone(model, series[i : i + 1], other[i : i + 1], where)
            for i in range(len(series))
        ]
    )
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(one[:1], out[:1])


def _swapped_alone(model, series, other, where):
    """The serial oracle: record the other's k-hot vectors, put them in by plain hooks."""
    points = [hook + POST for hook in model.acts_to_codebooks]
    _, cache = model.run_with_cache(other, names_filter=points)

    def put(acts, hook):
        to = where.get("pos", list(range(10)))
        acts = acts.clone()
        acts[:, to] = cache[hook.name][:, where.get("source_pos", to)]
        return acts

    return model.run_with_hooks(series, fwd_hooks=[(point, put) for point in points])[0]


def test_nothing_is_swapped_in_from_padding(model, make_book, series, mask):
    model.add_codebook(make_book(), MLP_OUT)
    before, theirs = (model.code_ids(given)[MLP_OUT] for given in (series, series.flip(0)))
    with model.swap_codes(series.flip(0), mask=mask):
        after = model.code_ids(series)[MLP_OUT]
    assert torch.equal(after[~mask], before[~mask])
    theirs = model.code_ids(series.flip(0), mask)[MLP_OUT]
    assert torch.equal(after[mask], theirs[mask])
    padding = model.swap_codes(series, pos=9, mask=mask)
    with pytest.raises(ArgumentError, match="source has padding"), padding:
        pass
    four = model.swap_codes(series[:4])
    with pytest.raises(SeriesShapeError, match="a source of one series"), four:
        model(series)


def test_interventions_nest_and_the_inner_has_the_last_word(model, make_book, series):
    model.add_codebook(make_book(), MLP_OUT)
    with model.force_codes({MLP_OUT: 5}):
        with model.force_codes({MLP_OUT: 6}, pos=0), model.ban_codes({MLP_OUT: 5}, pos=1):
            ids = model.code_ids(series)[MLP_OUT][..., 0]
            assert (ids[:, 0] == 6).all()
            assert (ids[:, 1] != 5).all() and (ids[:, 2:] == 5).all()
        assert (model.code_ids(series)[MLP_OUT] == 5).all()


def test_gradients_flow_through_an_intervention(model, make_book, series):
    model.add_codebook(make_book(gradient="task"), MLP_OUT)
    book, hook_name = model.acts_to_codebooks[MLP_OUT], MLP_OUT + POST
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    weights = one_hot(5)

    def grads():
        loss = model(series, return_type="loss", target=target)
        model.zero_grad()
        loss.backward()
        return [book.table.grad.clone(), model.blocks[0].mlp.W_in.grad.clone()]

    edit = set_codes(range(10), [0], weights)
    with model.hooks(fwd_hooks=[(hook_name, edit)]):
        expected = grads()
    for others in ("keep", "drop"):
        with model.force_codes({MLP_OUT: 5}, others=others):
            for found, wanted in zip(grads(), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    assert expected[0][0, 5].abs().sum() > 0 and expected[0][0, :5].abs().sum() == 0
    with model.ban_codes({MLP_OUT: [1, 2]}), model.swap_codes(series.flip(0)):
        assert all(gradient.isfinite().all() for gradient in grads())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.force_codes({Z: 3}), ArgumentError, "has 2 groups .* group=, head="),
        (lambda m: m.force_codes({MLP_OUT: 16}), ArgumentError, r"codes in 0..15 at .*, got 16"),
        (lambda m: m.force_codes({MLP_OUT: [1, 2]}), ArgumentError, "at most k=1 codes .* got 2"),
        (lambda m: m.force_codes({Z: 3}, group=2), ArgumentError, r"group in 0..1, got 2"),
        (lambda m: m.force_codes({Z: 3}, head=-3), ArgumentError, r"head in 0..1, got -3"),
        (lambda m: m.force_codes({MLP_OUT: 3}, head=0), ArgumentError, "have no head"),
        (lambda m: m.ban_codes({HIDDEN: 3}), UnknownHookError, "No codebook is spliced in there"),
        (lambda m: m.ban_codes({MLP_OUT: range(16)}), ArgumentError, "leaves fewer than k=1"),
        (lambda m: m.ban_codes({MLP_OUT: 1}, fill="x"), ArgumentError, "fill as 'next' or 'zero'"),
        (lambda m: m.ban_codes({MLP_OUT: []}), ArgumentError, "at least one code"),
    ],
)
def test_impossible_interventions_are_refused(
    model, make_book, call, error, message, no_shape_checks
):
    model.add_codebook(make_book(), MLP_OUT)
    model.add_codebook(make_book(n_groups=2), Z)
    with pytest.raises(error, match=message), call(model):
        pass
    outside = model.force_codes({MLP_OUT: 3}, pos=10)
    with pytest.raises(ArgumentError, match=r"expected pos in 0..9, got 10"), outside:
        model(torch.randn(1, 3, 10))


# --- patching --------------------------------------------------------------------------------


@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize(("axis", "points"), [("pos", 10), ("feature", 16)])
def test_a_sweep_over_codes_equals_its_serial_oracle(
    model, make_book, series, axis, points, banned
):
    model.add_codebook(make_book(k=2, normalize=True), MLP_OUT)
    model.add_codebook(make_book(n_groups=2), Z)
    point, corrupted = MLP_OUT + POST, series.flip(0)
    metric = log_prob(torch.tensor([0, 1, 2, 3, 0, 1]))
    with model.ban_codes({MLP_OUT: [0, 1]} if banned else {MLP_OUT: 15}, "next", pos=0):
        result = sweep(model, series, corrupted, Site(point), (axis,), metric, progress=False)
        _, clean = model.run_with_cache(series, names_filter=point)
        for index in range(points):

            def put(acts, hook, index=index):
                acts = acts.clone()
                at = (slice(None), index) if axis == "pos" else (..., index)
                acts[at] = clean[point][at]
                return acts

            out = model.run_with_hooks(corrupted, fwd_hooks=[(point, put)])
            expected = out.log_softmax(-1)[range(6), [0, 1, 2, 3, 0, 1]]
            torch.testing.assert_close(result.values[:, index], expected.detach())


# --- a trained model -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_an_untuned_splice_keeps_the_norm_of_real_activations(k):
    model = HookedTST.from_pretrained("japanese-vowels")
    train = load_dataset("JapaneseVowels", split="train")
    test = load_dataset("JapaneseVowels", split="test")
    hooks = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"]
    with torch.no_grad():
        _, cache = model.run_with_cache(train.series[:120], names_filter=hooks)
        _, clean = model.run_with_cache(test.series[:120], names_filter=hooks)
        model.add_codebooks(CodebookConfig(n_codes=256, k=k, normalize=True), hooks)
        for hook, book in model.acts_to_codebooks.items():
            book.sample(cache[hook])
            given = clean[hook].flatten(0, 1)
            ratio = copy.deepcopy(book).snap(given).norm(dim=-1) / given.norm(dim=-1)
            assert abs(float(ratio.median()) - 1) < 0.1, (hook, float(ratio.median()))
