"""The activation stream against activations cached the ordinary way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from tstlens.errors import ArgumentError, CorruptFileError, HookError, StorageError
from tstlens.saes import ActivationStream

MLP_OUT, Z = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


def cached(model, data, hook):
    """Observed activations [row, ...] in order, from a plain run with a cache."""
    _, cache = model.run_with_cache(data.series, mask=data.mask, names_filter=[hook])
    acts = cache[hook]
    return acts[data.mask] if data.mask is not None else acts.flatten(0, 1)


def sorted_rows(rows):
    return torch.tensor(sorted(rows.tolist()))


def epoch_of(stream, n_rows):
    """Everything that one epoch gives; the batch size divides it."""
    return torch.cat([next(stream) for _ in range(n_rows // stream.batch_size)])


@pytest.fixture(params=["memory", "disk", "nothing"])
def kept(request, tmp_path):
    """Options that make a stream keep its activations in each of the possible places."""
    tiny = {"memory_mb": 1e-2, "series_per_pass": 5}
    options = {
        "memory": {},
        "disk": {"cache": tmp_path / "acts", "shard_mb": 1e-3, **tiny},
        "nothing": tiny,
    }
    return request.param, options[request.param]


def test_an_epoch_is_every_observed_position_once(model, data, kept):
    where, options = kept
    expected = cached(model, data, MLP_OUT)  # 344 rows
    stream = ActivationStream(model, data, MLP_OUT, batch_size=172, seed=0, **options)
    assert stream.kept_in == where
    for _ in range(2):
        seen = epoch_of(stream, len(expected))
        torch.testing.assert_close(sorted_rows(seen), sorted_rows(expected))
        assert not torch.allclose(seen, expected)  # shuffled


def test_batches_have_their_size_across_epochs_and_the_seed_decides(model, data, kept):
    _, options = kept
    first, same = (
        ActivationStream(model, data, MLP_OUT, batch_size=100, seed=3, **options) for _ in range(2)
    )
    batches = [next(first) for _ in range(12)]  # three and a half epochs
    assert {batch.shape for batch in batches} == {(100, 8)}
    assert all(torch.equal(next(same), batch) for batch in batches)
    if "cache" not in options:
        other = ActivationStream(model, data, MLP_OUT, batch_size=100, seed=4, **options)
        assert not torch.equal(next(other), batches[0])


def test_a_stream_goes_on_where_another_stopped(model, data, kept):
    _, options = kept
    first, second = (
        ActivationStream(model, data, MLP_OUT, batch_size=100, seed=0, **options) for _ in range(2)
    )
    for _ in range(7):
        next(first)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(next(first), next(second)) for _ in range(6))


def test_places_say_where_every_activation_comes_from(model, data):
    stream = ActivationStream(model, data, MLP_OUT, batch_size=64, remember=True)
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    for _ in range(7):
        batch, places = next(stream), stream.last_places
        torch.testing.assert_close(batch, cache[MLP_OUT][places[:, 0], places[:, 2]])
        assert data.mask[places[:, 0], places[:, 2]].all()
        assert (places[:, [1, 3]] == -1).all()


def test_places_of_channels_and_heads(per_channel_model, full):
    model = per_channel_model
    stream = ActivationStream(model, full, Z, batch_size=64, head="each", remember=True)
    batch, places = next(stream), stream.last_places
    _, cache = model.run_with_cache(full.series)
    z = cache[Z].unflatten(0, (40, 3))  # [series, channel, pos, head, d_head]
    torch.testing.assert_close(batch, z[tuple(places.T)])
    assert [int(places[:, axis].max()) for axis in range(4)] == [39, 2, 4, 1]


def test_heads_joined_each_or_one(model, data):
    z = cached(model, data, Z)  # [row, head, d_head]
    joined = ActivationStream(model, data, Z, batch_size=344)
    torch.testing.assert_close(sorted_rows(next(joined)), sorted_rows(z.flatten(1)))
    each = ActivationStream(model, data, Z, batch_size=688, head="each")
    torch.testing.assert_close(sorted_rows(next(each)), sorted_rows(z.flatten(0, 1)))
    one = ActivationStream(model, data, Z, batch_size=344, head=1)
    torch.testing.assert_close(sorted_rows(next(one)), sorted_rows(z[:, 1]))


def test_several_hooks_from_one_pass_have_rows_that_belong_together(model, data):
    hooks = ["blocks.0.hook_resid_mid", MLP_OUT]
    stream = ActivationStream(model, data, hooks, batch_size=50, remember=True)
    batch, places = next(stream), stream.last_places
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    for hook in hooks:
        torch.testing.assert_close(batch[hook], cache[hook][places[:, 0], places[:, 2]])


def test_the_forward_pass_stops_at_the_layer_that_is_needed(model, data):
    ran = []
    model.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    next(ActivationStream(model, data, MLP_OUT, batch_size=8))
    next(ActivationStream(model, data, "hook_embed", batch_size=8))
    assert not ran
    next(ActivationStream(model, data, Z, batch_size=8))
    assert ran


def test_pooled_vectors_have_one_row_per_series(model, data):
    stream = ActivationStream(model, data, "head.hook_pooled", batch_size=40, remember=True)
    _, cache = model.run_with_cache(data.series, mask=data.mask)
    batch, places = next(stream), stream.last_places
    torch.testing.assert_close(batch, cache["head.hook_pooled"][places[:, 0]])
    assert (places[:, 1:] == -1).all()


def test_a_model_in_training_is_left_in_training(model, data):
    model.train()
    next(ActivationStream(model, data, MLP_OUT, batch_size=8))
    assert model.training


def test_a_corrupt_shard_is_named(model, data, tmp_path):
    options = {"cache": tmp_path, "shard_mb": 1e-3, "series_per_pass": 5, "batch_size": 20}
    next(ActivationStream(model, data, MLP_OUT, **options))
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes(content)
    stream = ActivationStream(model, data, MLP_OUT, **options)
    with pytest.raises(CorruptFileError, match=f"{victim.name} is truncated or was altered"):
        for _ in range(30):
            next(stream)
    victim.unlink()  # what the message advises
    epoch_of(ActivationStream(model, data, MLP_OUT, **options), 344)


def test_a_cache_of_something_else_is_refused(model, data, make_model, tmp_path):
    next(ActivationStream(model, data, MLP_OUT, cache=tmp_path, batch_size=8))
    for other in (
        ActivationStream(make_model(seed=1), data, MLP_OUT, cache=tmp_path),
        ActivationStream(model, data[:30], MLP_OUT, cache=tmp_path),
        ActivationStream(model, data, Z, cache=tmp_path),
    ):
        with pytest.raises(StorageError, match="activations of another harvest"):
            next(other)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"index.json .* no index"):
        next(ActivationStream(model, data, MLP_OUT, cache=tmp_path))


@pytest.mark.slow
def test_a_killed_harvest_goes_on_where_it_was(tmp_path, repository):
    """Killed outright (SIGKILL) after a few shards; the second run writes the others only."""
    code = textwrap.dedent(f"""
        import os, signal, sys, torch
        torch.set_num_threads(1)
        from tstlens.model import HeadConfig, HookedTST, HookedTSTConfig, PerStepConfig
        from tstlens.saes import ActivationStream, stream as shards
        model = HookedTST(HookedTSTConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=12, n_channels=3,
            n_time=10, embed=PerStepConfig(), head=HeadConfig("mean", n_classes=4)))
        series = torch.randn(40, 3, 10, generator=torch.Generator().manual_seed(1))
        written, write = [], shards._write_shard
        def counted(*args):
            if len(written) == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(args[2])
            return write(*args)
        shards._write_shard = counted
        stream = ActivationStream(model, series, "{MLP_OUT}", cache="{tmp_path}", shard_mb=1e-3,
            series_per_pass=5, batch_size=20)
        rows = torch.cat([next(stream) for _ in range(20)])
        print(written[0], len(written), float(rows.double().sum()))
    """)

    def run(kill_after):
        return subprocess.run(
            [sys.executable, "-c", code, str(kill_after)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repository)},
        )

    assert run(3).returncode == -signal.SIGKILL
    index = json.loads((tmp_path / "index.json").read_text())
    assert [entry is not None for entry in index["shards"][:4]] == [True] * 3 + [False]
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    second = run(10**6)
    assert second.returncode == 0, second.stderr
    first, n_written, _ = second.stdout.split()
    assert int(first) == 3 and int(n_written) == len(index["shards"]) - 3
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_errors_say_what_is_wrong(model, data):
    with pytest.raises(ArgumentError, match="batch_size as an integer of at least 1, got 0"):
        ActivationStream(model, data, MLP_OUT, batch_size=0)
    with pytest.raises(ArgumentError, match=r"memory_mb as a positive number, got 0"):
        ActivationStream(model, data, MLP_OUT, memory_mb=0.0)
    with pytest.raises(ArgumentError, match=r"head in 0\.\.1, got 2"):
        ActivationStream(model, data, Z, head=2)
    with pytest.raises(ArgumentError, match="blocks.0.hook_mlp_out has no heads"):
        next(ActivationStream(model, data, MLP_OUT, head="each"))
    with pytest.raises(ArgumentError, match="stream one hook"):
        ActivationStream(model, data, [Z, MLP_OUT], head="each")
    with pytest.raises(ArgumentError, match="same positions"):
        next(ActivationStream(model, data, ["head.hook_pooled", MLP_OUT]))
    with pytest.raises(HookError, match="has no feature axis"):
        ActivationStream(model, data, "blocks.0.attn.hook_pattern")
    with pytest.raises(HookError, match="set_use_attn_result"):
        ActivationStream(model, data, "blocks.0.attn.hook_result")
    with pytest.raises(ArgumentError, match="their own mask"):
        ActivationStream(model, data, MLP_OUT, data.mask)


@pytest.mark.parametrize(
    ("positions", "expected"), [(2, [2]), ([0, -1], [0, 9]), (slice(3, 5), [3, 4])]
)
def test_positions_are_those_asked_for(model, full, positions, expected):
    stream = ActivationStream(
        model, full, MLP_OUT, positions=positions, batch_size=20, remember=True
    )
    _, cache = model.run_with_cache(full.series, names_filter=[MLP_OUT])
    batch, places = next(stream), stream.last_places
    assert sorted(set(places[:, 2].tolist())) == expected
    torch.testing.assert_close(batch, cache[MLP_OUT][places[:, 0], places[:, 2]].detach())
    with pytest.raises(ArgumentError, match="positions were given, but head.hook_pooled has none"):
        next(ActivationStream(model, full, "head.hook_pooled", positions=positions))
