"""Several threads on one model: the numbers of one thread alone, or an error that says why."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.model.conftest import build
from tstlens import patching
from tstlens.errors import HookError
from tstlens.model.hooking import Turn

CLEAN, CORRUPTED = torch.randn(2, 3, 3, 12, generator=torch.Generator().manual_seed(1))
METRIC = patching.log_prob(torch.tensor([0, 3, 1]))
NAME = "blocks.0.attn.hook_pattern"


class Doubling(torch.nn.Module):
    """A dictionary whose reconstruction is twice the activation."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def spliced(model: Any) -> torch.Tensor:
    with torch.no_grad(), model.saes():
        model.splice(Doubling(), "blocks.1.hook_mlp_out")
        return model(CLEAN)


def cached(model: Any) -> torch.Tensor:
    _, cache = model.run_with_cache(CLEAN)
    return torch.cat([value.detach().flatten() for _, value in sorted(cache.items())])


def hooked(model: Any) -> torch.Tensor:
    return model.run_with_hooks(CLEAN, fwd_hooks=[(NAME, lambda x, hook: x * 0)])


def edges(model: Any) -> torch.Tensor:
    return torch.as_tensor(patching.edge_sweep(model, CLEAN, CORRUPTED, METRIC).values)


WORK: dict[str, Any] = {
    "sweep": lambda m: patching.sweep(m, CLEAN, CORRUPTED, "z", ("layer", "head"), METRIC).values,
    "late sweep": lambda m: (
        patching.sweep(m, CLEAN, CORRUPTED, "mlp_out", ("layer", "pos"), METRIC).values
    ),
    "attribution": lambda m: (
        patching.attribution(m, CLEAN, CORRUPTED, "z", ("layer", "head"), METRIC).values
    ),
    "ablate": lambda m: patching.ablate(m, CLEAN, "z", ("layer", "head"), metric=METRIC).values,
    "cache": cached,
    "hooks": hooked,
    "forward": lambda m: m(CLEAN),
    "spliced": spliced,
    "in parts": lambda m: m.unembed(m(CLEAN, stop_at_layer=2)),
}


def numbers(found: Any) -> torch.Tensor:
    return torch.as_tensor(found).detach().clone()


def assert_nothing_left(model: Any) -> None:
    assert not model.list_hooks() and not model.acts_to_saes
    assert not any(point._forward_hooks for point in model.hook_points())
    assert model.context_level == 0


def test_every_mix_of_work_gives_the_numbers_of_one_thread_alone(norm_position, monkeypatch):
    monkeypatch.setattr(Turn, "idle_s", 60.0)  # this machine may be slow, not stuck
    model = build(norm_position=norm_position)
    alone = {name: numbers(work(model)) for name, work in WORK.items()}
    jobs = [name for name in WORK for _ in range(6)]
    order = torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: (jobs[n], numbers(WORK[jobs[n]](model))), order))
    for name, values in found:
        assert torch.equal(values, alone[name]), name
    assert_nothing_left(model)


def test_edges_of_two_threads_are_those_of_one(monkeypatch):
    monkeypatch.setattr(Turn, "idle_s", 60.0)
    model = build()
    work = {"edges": edges, "hooks": hooked, "cache": cached}
    alone = {name: numbers(one(model)) for name, one in work.items()}
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda name: (name, numbers(work[name](model))), list(work) * 3))
    for name, values in found:
        assert torch.equal(values, alone[name]), name


def waiting(act: Any) -> list[Any]:
    """What another thread's ``act`` gave while this one waited for it, or its error."""
    got: list[Any] = []

    def run() -> None:
        try:
            got.append(act())
        except Exception as error:
            got.append(error)

    thread = threading.Thread(target=run, name="the other one")
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return got


@pytest.mark.parametrize("act", [*WORK, "deepcopy", "reset_hooks", "add_hook", "splice"])
def test_a_thread_never_sees_the_hooks_that_another_one_keeps(act, monkeypatch):
    monkeypatch.setattr(Turn, "idle_s", 0.1)
    model = build()
    clean = model(CLEAN)
    acts = {
        "deepcopy": lambda: copy.deepcopy(model),
        "reset_hooks": lambda: model.reset_hooks(),
        "add_hook": lambda: model.add_hook(NAME, lambda x, hook: x * 0),
        "splice": lambda: model.splice(Doubling(), "blocks.1.hook_mlp_out"),
    }
    with model.hooks(fwd_hooks=[(NAME, lambda x, hook: x * 0)]):
        edited = model(CLEAN)
        (refused,) = waiting(acts.get(act, lambda: WORK[act](model)))
        assert torch.equal(model(CLEAN), edited) and not torch.equal(edited, clean)
    assert isinstance(refused, HookError)
    assert "'MainThread' has hooks" in str(refused) and "copy.deepcopy(model)" in str(refused)
    assert_nothing_left(model)
    assert torch.equal(waiting(lambda: model(CLEAN))[0], clean)


@pytest.mark.parametrize(
    "context",
    [
        lambda m: m.saes(),
        lambda m: m.snapping(False),
        lambda m: m.codebooks(()),
        lambda m: m.hooks(),
    ],
)
def test_every_context_keeps_other_threads_out(context, monkeypatch):
    monkeypatch.setattr(Turn, "idle_s", 0.1)
    model = build()
    with context(model):
        assert isinstance(waiting(lambda: model(CLEAN))[0], HookError)
    assert torch.equal(waiting(lambda: model(CLEAN))[0], model(CLEAN))


def test_a_thread_waits_while_another_one_goes_on(monkeypatch):
    """However long the other one takes, as long as it takes steps."""
    monkeypatch.setattr(Turn, "idle_s", 0.3)
    model, started = build(), threading.Event()

    def keep_running() -> None:
        with model.hooks(fwd_hooks=[(NAME, lambda x, hook: x * 0)]):
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                model(CLEAN)
                started.set()
                time.sleep(0.01)

    clean = model(CLEAN)
    thread = threading.Thread(target=keep_running)
    thread.start()
    assert started.wait(30)
    assert torch.equal(model(CLEAN), clean)
    thread.join()


def test_the_turn_is_given_back_after_an_error_and_taken_again_within(no_shape_checks):
    model = build()

    def fail(x: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("inside a hook")

    def nested(x: torch.Tensor, hook: Any) -> None:
        model.run_with_cache(CLEAN, names_filter="hook_embed", stop_at_layer=1)

    for act in (
        lambda: model.run_with_hooks(CLEAN, fwd_hooks=[(NAME, fail)]),
        lambda: model(CLEAN[0]),
        lambda: model.add_hook("no such hook", fail),
        lambda: patching.sweep(model, CLEAN, CORRUPTED, "z", ("nothing",), METRIC),
    ):
        with pytest.raises((RuntimeError, ValueError, LookupError)):
            act()
    model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.1.hook_resid_pre", nested)])
    assert torch.equal(waiting(lambda: model(CLEAN))[0], model(CLEAN))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_turn_of_its_own(copied, monkeypatch):
    monkeypatch.setattr(Turn, "idle_s", 0.1)
    model = build()
    twin = copied(model)
    with model.hooks(fwd_hooks=[(NAME, lambda x, hook: x * 0)]):
        assert torch.equal(waiting(lambda: twin(CLEAN))[0], twin(CLEAN))
    assert torch.equal(twin(CLEAN), model(CLEAN))


def test_two_models_taken_in_either_order_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(Turn, "busy_s", 5.0)
    from tstlens.arguments import checked

    @checked
    def both(one: Any, other: Any) -> torch.Tensor:
        return one(CLEAN) + other(CLEAN)

    models = build(), build(seed=1)
    expected = both(*models)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: both(*models[:: 1 - 2 * (n % 2)]), range(40)))
    assert all(torch.equal(one, expected) for one in found)
