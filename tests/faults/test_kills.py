"""Kills, full disks and failing steps at every place: what is on disk is old or new, not mixed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from contextlib import suppress

import pytest

from tests.faults.injector import (
    LONG,
    TALLY,
    chosen,
    count,
    fails_once,
    full_disk,
    killed_at,
    read_only,
)
from tests.faults.places import RUNS, SAVED, quiet
from tstlens.errors import StorageError, TstlensError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="dies in forks of this process")


def left_over(folder):
    return [path for path in folder.rglob(".tstlens*")]


@pytest.fixture(params=SAVED)
def saved(request, tmp_path):
    """A kind of thing on disk, its old state, and what its two states read as."""
    place = SAVED[request.param]
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        place.write(folder, 0)
    place.write(new, 1)
    known = [place.read(old), place.read(new)]
    assert known[0] != known[1]
    return place, old, known


def test_a_killed_save_leaves_the_old_or_the_new_and_the_next_one_clears_up(saved, tmp_path):
    place, old, known = saved
    work = tmp_path / "work"
    shutil.copytree(old, work)
    n_steps = count(work, lambda: place.write(work, 1))
    assert n_steps > 2
    for number in chosen(n_steps):
        shutil.rmtree(work)
        shutil.copytree(old, work)
        killed_at(work, number, lambda: place.write(work, 1))
        assert place.read(work) in known, f"mixed after a kill at step {number}"
        place.write(work, 1)
        assert place.read(work) == known[1]
        assert not left_over(work)


@pytest.mark.parametrize("fault", [full_disk, fails_once, read_only])
def test_a_save_that_fails_says_so_and_leaves_the_old(saved, fault, tmp_path):
    place, old, known = saved
    work = tmp_path / "work"
    shutil.copytree(old, work)
    for number in chosen(count(work, lambda: place.write(work, 1))):
        shutil.rmtree(work)
        shutil.copytree(old, work)
        failed = None
        with fault(work, number):
            try:
                place.write(work, 1)
            except StorageError as error:
                failed = error
        found = place.read(work)
        assert found in known
        if failed is None:
            assert found == known[1]
        if fault is full_disk:
            assert not left_over(work)
            assert failed is None or found == known[0], "it failed, and is not as it was"


def test_two_writers_of_one_place_leave_one_of_the_two(saved, tmp_path):
    place, old, known = saved
    faults: list[BaseException] = []

    def write(seed):
        try:
            for _ in range(3):
                place.write(old, seed)
        except BaseException as error:
            faults.append(error)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert all(isinstance(fault, StorageError) for fault in faults), faults
    assert place.read(old) in known and not left_over(old)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_killed_run_goes_on_to_the_same_numbers(run, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected: list[object] = []
    n_steps = count(whole, lambda: expected.append(run(whole)))
    numbers = chosen(n_steps)
    for number in numbers if len(numbers) == n_steps else numbers[1::2]:
        work = tmp_path / f"killed-{number}"
        work.mkdir()
        assert killed_at(work, number, lambda w=work: run(w))
        assert run(work) == expected[0], f"other numbers after a kill at step {number}"


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(run, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    expected: list[object] = []
    numbers = chosen(count(whole, lambda: expected.append(run(whole))))
    for number in numbers[::4]:
        work = tmp_path / f"full-{number}"
        work.mkdir()
        found = None
        with full_disk(work, number), suppress(StorageError):
            found = run(work)  # where nothing new is written any more
        assert found in (None, expected[0]) and (found is None or number > 1)
        assert run(work) == expected[0]


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_run_of_another_model_or_data_is_refused_by_name_and_kept(run, tmp_path):
    expected = run(tmp_path, 0)
    with pytest.raises(TstlensError, match="another|other settings"):
        run(tmp_path, 1)
    assert run(tmp_path, 0) == expected


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_two_runs_in_one_folder_are_refused_or_agree(run, tmp_path):
    expected = run(tmp_path / "alone", 0) if (tmp_path / "alone").mkdir() is None else None
    found: list[object] = []

    def go():
        try:
            found.append(quiet(lambda: run(tmp_path)))
        except BaseException as error:
            found.append(error)

    runs = [threading.Thread(target=go) for _ in range(2)]
    for one in runs:
        one.start()
    for one in runs:
        one.join(120)
    results = [one for one in found if not isinstance(one, StorageError)]
    assert len(found) == 2 and not [one for one in results if isinstance(one, BaseException)]
    # Threads share torch's generator, so a run beside another one may draw other numbers than
    # alone; that they did not share a file is seen by the folder, which the next run goes on with.
    assert results
    if run in (RUNS["campaign"], RUNS["harvest"]):
        assert all(one == expected for one in results)


def test_processes_that_are_killed_in_earnest_leave_whole_models(tmp_path):
    """SIGKILL at moments that nobody chose."""
    place = SAVED["sae in a model"]
    known = []
    for seed in (0, 1):
        place.write(tmp_path, seed)
        known.append(place.read(tmp_path))
    for _ in range(600 if LONG else 5):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for seed in (0, 1):
                        place.write(tmp_path, seed)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.01, 0.3))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        TALLY["kills"] += 1
        assert place.read(tmp_path) in known
    place.write(tmp_path, 0)
    assert place.read(tmp_path) == known[0] and not left_over(tmp_path)
