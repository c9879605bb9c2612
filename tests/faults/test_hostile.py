"""Damaged and hostile files and places: an error of ours in words, soon, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.faults.injector import LONG, as_nobody, peak
from tests.faults.places import RUNS, SAVED, Place, harvest, model, numbers, quiet, sae
from tstlens import HookedTST, codebooks, convert, saes
from tstlens.errors import CorruptFileError, StorageError, TstlensError
from tstlens.model import HeadConfig, HookedTSTConfig, PerStepConfig
from tstlens.patching.circuits.circuit import Circuit
from tstlens.patching.circuits.graph import ComponentGraph
from tstlens.report.card import model_card
from tstlens.storage import check_packed, read_torch

DEEP = "[" * 100_000 + "]" * 100_000


@contextmanager
def within(seconds):
    """Fail, and do not wait, if it takes longer."""

    def late(*_):
        raise AssertionError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damages(content: bytes):
    """Truncated, flipped and altered versions of a file."""
    size = len(content)
    yield from (content[:cut] for cut in (0, 1, 7, size // 2, size - 1))
    places = range(0, size, max(1, size // (400 if LONG else 12)))
    for place in places:
        yield content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :]
    yield os.urandom(200)
    yield DEEP.encode()
    yield (2**62).to_bytes(8, "little") + content
    yield b'{"format": "\\ud800"}'
    try:
        record = json.loads(content)
    except ValueError:
        return
    if not isinstance(record, dict):
        return
    for odd in (None, 10**12, -1, "\ud800", [], {}, True, [[]], 1e308, "x" * 300):
        for key in record:
            yield json.dumps({**record, key: odd}).encode()
    for key in record:
        yield json.dumps({k: v for k, v in record.items() if k != key}).encode()


def check_damaged(folder, work, read, known):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert files
    for path in files:
        for content in damages(path.read_bytes()):
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder, work)
            (work / path.relative_to(folder)).write_bytes(content)
            with within(5):
                try:
                    found = quiet(lambda: read(work))
                except TstlensError as error:
                    assert "weights_only" not in str(error) and len(str(error)) < 3000
                else:
                    assert found == known, f"{path.name} was altered, and nobody noticed"


@pytest.mark.parametrize("name", [name for name in SAVED if name != "report"])
def test_a_damaged_file_is_an_error_in_words_or_no_damage(name, tmp_path):
    place: Place = SAVED[name]
    (tmp_path / "whole").mkdir()
    place.write(tmp_path / "whole", 0)
    if name == "codebooks":  # README and scores change no result, and carry no sum
        place = Place(
            place.write, lambda folder: numbers(codebooks.load(folder / "m").state_dict())
        )
    known = place.read(tmp_path / "whole")
    if name == "notes":  # are text for people to edit, and carry no sum
        known = type("Any", (), {"__eq__": lambda *_: True, "__hash__": None})()
    check_damaged(tmp_path / "whole", tmp_path / "work", place.read, known)


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_is_an_error_in_words_or_starts_over(name, tmp_path):
    (tmp_path / "whole").mkdir()
    known = RUNS[name](tmp_path / "whole")
    if not LONG:
        for path in sorted((tmp_path / "whole").rglob("*")):  # one of each kind is enough
            if path.suffix == ".safetensors" and name == "harvest" and "00000" not in path.name:
                path.unlink()
        known = RUNS[name](tmp_path / "whole")
    if name in ("train", "codebooks"):  # torch's own zip has sums only of what it packs
        known = type("Any", (), {"__eq__": lambda *_: True, "__hash__": None})()
    check_damaged(tmp_path / "whole", tmp_path / "work", RUNS[name], known)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_torch(path, "weights", "save them again"),
        lambda path: convert(path, "conv_tst"),
        check_packed,
    ],
)
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_not_unpacked(tmp_path, read):
    path = tmp_path / "bomb.pt"
    torch.save({"weights": torch.zeros(40 * 2**20)}, path)
    check_packed(path)  # what torch writes is not packed at all
    with (
        zipfile.ZipFile(path) as stored,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(CorruptFileError, match="claims to unpack to 167,[0-9,]* bytes, more than"):
        read(tmp_path / "packed.pt")


@pytest.fixture
def folder(tmp_path):
    return model().save_pretrained(tmp_path / "m")


def sealed(folder, change):
    """Change a config and make its sums right again, as who means harm would."""
    record = json.loads((folder / "config.json").read_text())
    change(record["config"])
    record.pop("config_sha256")
    (folder / "config.json").write_text(json.dumps(record))


@pytest.mark.parametrize("size", [10**6, 10**9, 10**12])
@pytest.mark.parametrize("name", ["n_layers", "d_model", "n_heads", "d_mlp", "d_head", "n_ctx"])
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(
    folder, name, size
):
    import resource

    if name == "n_ctx":
        sealed(folder, lambda cfg: cfg.update(n_ctx=size, positions="learned"))
    else:
        sealed(folder, lambda cfg: cfg.update({name: size, "d_head": 4} | {name: size}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(5), pytest.raises(CorruptFileError):
        HookedTST.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("size", [10**6, 10**12])
@pytest.mark.parametrize("name", ["n_layers", "n_heads", "n_pos", "n_channels"])
def test_a_circuit_of_more_parts_than_scores_is_refused(tmp_path, name, size):
    graph = ComponentGraph(1, 2)
    scores = torch.arange(float(len(graph.edges)), dtype=torch.float64)
    circuit = Circuit(graph, scores, scores > 1, "log p", "nats")
    path = circuit.to_json(tmp_path / "c.json")
    assert torch.equal(Circuit.from_json(path).scores, scores)
    record = json.loads(path.read_text())
    record["components"][name] = size
    path.write_text(json.dumps(record))
    with within(5), pytest.raises(CorruptFileError, match="scores, its graph has"):
        Circuit.from_json(path)


@pytest.mark.parametrize("part", ["n_units", "n_codes", "n_groups", "n_heads"])
def test_an_index_of_more_codes_than_its_tables_is_refused(tmp_path, part):
    SAVED["index"].write(tmp_path, 0)
    path = tmp_path / "i" / "index.json"
    record = json.loads(path.read_text())
    record.pop("record_sha256")  # as one who means harm would
    path.write_text(json.dumps(record))
    SAVED["index"].read(tmp_path)  # an older index has no sum of its own
    record["books"][0][part] = 10**11
    record["books"][0]["shared"] = True
    path.write_text(json.dumps(record))
    with within(5), pytest.raises(CorruptFileError, match="sizes of"):
        SAVED["index"].read(tmp_path)


@pytest.mark.parametrize("size", [10**9, 10**12])
@pytest.mark.parametrize("name", ["d_in", "d_sae"])
def test_an_sae_larger_than_its_weights_is_refused(tmp_path, name, size):
    place = saes.save(sae(0), tmp_path / "s")
    (place / "sha256.json").unlink()
    config = json.loads((place / "cfg.json").read_text())
    (place / "cfg.json").write_text(json.dumps({**config, name: size}))
    with within(5), pytest.raises(CorruptFileError, match="no SAE"):
        saes.load(place)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' counters")
def test_reading_takes_at_most_three_times_the_file(tmp_path):
    cfg = HookedTSTConfig(
        2, 512, 2, 2048, n_channels=1, embed=PerStepConfig(), head=HeadConfig("mean", n_classes=2)
    )
    folder = HookedTST(cfg).save_pretrained(tmp_path / "m")
    width = {"encoder.weight": torch.randn(6000, 512), "decoder.weight": torch.randn(512, 6000)}
    dictionary = saes.save(saes.from_linear(width, "blocks.0.hook_mlp_out"), tmp_path / "s")
    cases = [
        (folder / "model.safetensors", lambda: HookedTST.from_pretrained(folder)),
        (dictionary / "sae_weights.safetensors", lambda: saes.load(dictionary)),
    ]
    for file, read in cases:
        read()  # imports are not what is measured
        size = file.stat().st_size
        assert size > 20 * 2**20
        assert peak(read) <= 3 * size
        content = file.read_bytes()
        for damaged in (content[: size // 2], content[:-9] + b"\0" * 9, b"\xff" * size):
            file.write_bytes(damaged)
            assert peak(read) <= 3 * size


def test_an_sae_without_sums_still_loads(tmp_path):
    place = saes.save(sae(0), tmp_path / "s")
    (place / "sha256.json").unlink()
    assert torch.equal(saes.load(place).W_enc, sae(0).W_enc)


def strange(kind, path, outside):
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside / "no" / "such")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", ["notes.txt", "saes", "model.safetensors", "config.json"])
def test_what_is_no_file_is_never_followed_and_named_when_saving(folder, tmp_path, kind, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    place = folder / name
    place.unlink(missing_ok=True)
    strange(kind, place, outside)
    with within(5), pytest.raises(StorageError, match=f"{name} is a .* in the way.*move it away"):
        model(1).save_pretrained(folder)
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert place.is_symlink() == (kind != "pipe")
    if name in ("model.safetensors", "config.json"):
        with within(5), pytest.raises(StorageError):
            HookedTST.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("name", ["report", "notes"])
def test_a_file_is_not_written_through_a_link_or_into_a_pipe(tmp_path, kind, name):
    target = tmp_path / "mine"
    target.write_text("mine")
    path = tmp_path / {"report": "r.html", "notes": "notes.json"}[name]
    strange(kind, path, target if kind == "link" else tmp_path)
    with within(5), pytest.raises(StorageError, match="in the way"):
        SAVED[name].write(tmp_path, 0)
    assert target.read_text() == "mine"


WRITERS = {
    **{f"save {name}": place.write for name, place in SAVED.items()},
    **{f"run {name}": run for name, run in RUNS.items()},
}


@pytest.fixture
def open_path():
    """A folder that everybody may enter, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700)
    shutil.rmtree(folder)


def permit(folder, files, folders):
    for path in [folder, *folder.rglob("*")]:
        path.chmod(folders if path.is_dir() else files)


@pytest.mark.parametrize("holds", ["nothing", "an old one"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_may_only_be_read_is_refused_and_stays_as_it_is(open_path, name, holds):
    (open_path / "tried").mkdir()
    WRITERS[name](open_path / "tried", 0)  # whatever is imported late has been by then
    if holds == "nothing":
        shutil.rmtree(open_path / "tried")
        (open_path / "tried").mkdir()
    before = {path: path.read_bytes() for path in open_path.rglob("*") if path.is_file()}
    permit(open_path, 0o444, 0o555)
    with within(20):
        error = as_nobody(lambda: WRITERS[name](open_path / "tried", 1))
    assert isinstance(error, StorageError), error
    assert before == {path: path.read_bytes() for path in open_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [name for name in SAVED if name != "report"])
def test_a_file_that_may_not_be_read_is_named(open_path, name):
    SAVED[name].write(open_path, 0)
    SAVED[name].read(open_path)
    for path in [path for path in open_path.rglob("*") if path.is_file()]:
        permit(open_path, 0o444, 0o555)
        path.chmod(0)
        error = as_nobody(lambda: SAVED[name].read(open_path))
        if path.name not in ("README.md", "scores.json"):  # which only people read
            assert isinstance(error, StorageError), (path, error)
            assert not isinstance(error, CorruptFileError)
            assert path.name in str(error) and "cannot be read" in str(error)


ENDLESS = "n" * 300


@pytest.mark.parametrize("place", ["file/x", ENDLESS, f"{ENDLESS}/x", f"ok/{ENDLESS}"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path, place, name, monkeypatch):
    (tmp_path / "file").write_text("mine")
    work = WRITERS[name]
    if name in ("save sae in a model", "save index"):
        pytest.skip("a model, or an index, is made first")
    monkeypatch.setattr(HookedTST, "forward", lambda *_, **__: pytest.fail("worked first"))
    if name in ("run codebooks", "run train", "run sae"):
        monkeypatch.undo()  # what they run on is made on the way there
    with within(5), pytest.raises(StorageError):
        work(tmp_path / place, 0)
    with pytest.raises(TstlensError):
        HookedTST.from_pretrained(tmp_path / place)
    with pytest.raises(TstlensError):
        saes.load(tmp_path / place)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": kind, **odd}
        for kind in (
            "patchtst",
            "time_series_transformer",
            "timesfm",
            "t5",
            "moment",
            "itransformer",
        )
        for odd in (
            {},
            {"d_model": "x", "num_hidden_layers": []},
            {"d_model": -1, "num_layers": None, "architectures": 5},
            {"architectures": [5, {}], "chronos_config": 7, "task_name": {}},
        )
    ]
    + [{"architectures": 3}, {"model_type": ["a"]}, {"transformer_backbone": "T5", "d_model": {}}],
    ids=str,
)
def test_a_foreign_config_that_is_odd_is_an_error_in_words(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (convert, HookedTST.from_pretrained):
        with within(5), pytest.raises(TstlensError):
            quiet(lambda r=read: r(tmp_path))


def test_sums_of_an_old_harvest_with_other_shards_are_noticed(tmp_path):
    harvest(tmp_path, 0)
    record = json.loads((tmp_path / "run" / "index.json").read_text())
    record["shards"] = record["shards"][:1]
    (tmp_path / "run" / "index.json").write_text(json.dumps(record))
    with pytest.raises(CorruptFileError):
        harvest(tmp_path, 0)


NAMES = [
    '<img src=x onerror="alert(1)">',
    '")\nimport os; os.system("x")\n("',
    "a | b\n# c",
    "```\nx",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_a_name_and_runs_none_of_it(name):
    import ast

    made = model()
    made.cfg.model_name = name
    made.cfg.class_names = (name, "b")
    data = {"name": name, "scaling": None}
    made.info = {"data": data, "command": name, "seed": name, "recipe": {"x": name}}
    made.info["accuracy"] = {name: {"n_correct": 1, "n": 2, "accuracy": 0.5, "cross_entropy": 1.0}}
    card = model_card(made)
    code = card.split("```python\n")[1].split("\n```")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    assert called == {
        "tstlens.HookedTST.from_pretrained",
        "tstlens.load_dataset",
        "model.run_with_cache",
    }
    assert [c.args[0].value for c in calls if isinstance(c.args[0], ast.Constant)] == [name] * 2
    prose = "".join(part for at, part in enumerate(card.split("```")) if at % 2 == 0)
    if "```" not in name:
        assert "<img" not in prose and "\n# c" not in prose and "import os" not in prose.split("\n")
    rows = [line for line in card.splitlines() if line.startswith("|") and "of 2" in line]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 5
