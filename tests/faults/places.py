"""What tstlens keeps on disk: for each kind how an old and a new one are written, and how read."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tstlens import HookedTST, codebooks, patching, saes, storage, training
from tstlens.data import Pairs, TimeSeriesData
from tstlens.model import HeadConfig, HookedTSTConfig, PerStepConfig
from tstlens.model.saving import save_with
from tstlens.saes.stream import ActivationRows, harvest_to_disk

HOOK = "blocks.0.hook_mlp_out"


def model(seed: int = 0) -> HookedTST:
    head = HeadConfig("mean", n_classes=2)
    cfg = HookedTSTConfig(1, 8, 2, 8, n_channels=1, embed=PerStepConfig(), head=head, seed=seed)
    return HookedTST(cfg)


def data(seed: int = 0) -> TimeSeriesData:
    torch.manual_seed(seed)
    return TimeSeriesData(torch.randn(12, 1, 6), torch.arange(12) % 2, ("a", "b"))


def sae(seed: int) -> Any:
    torch.manual_seed(seed)
    layers = {"encoder.weight": torch.randn(12, 8), "decoder.weight": torch.randn(8, 12)}
    return saes.from_linear(layers, HOOK)


def with_books(seed: int) -> HookedTST:
    made = model(seed)
    torch.manual_seed(seed)
    made.add_codebook(
        codebooks.Codebook(codebooks.CodebookConfig(d_in=8, n_codes=4, n_groups=1, seed=seed)), HOOK
    )
    return made


def numbers(state: dict[str, Any]) -> tuple[float, ...]:
    """A few numbers that tell two sets of weights apart."""
    return tuple(float(tensor.double().abs().sum()) for _, tensor in sorted(state.items()))


@dataclass(frozen=True)
class Place:
    """One kind of thing on disk.

    Args:
        write: ``write(folder, seed)``; two seeds give two different things.
        read: ``read(folder)`` gives numbers that tell which one is there.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]


def _read_model(folder: Path) -> Any:
    return numbers(HookedTST.from_pretrained(folder / "m").state_dict())


def _read_with_sae(folder: Path) -> Any:
    return _read_model(folder), numbers(saes.load(folder / "m", HOOK).state_dict())


def _write_with_sae(folder: Path, seed: int) -> None:
    if not (folder / "m").exists():
        model(0).save_pretrained(folder / "m")
    saes.save(sae(seed), folder / "m" / "saes" / HOOK)


def _write_books(folder: Path, seed: int) -> None:
    texts = {"scores.json": f"{seed}", "README.md": f"{seed}"}
    save_with(with_books(seed), folder / "m", texts, only_spliced=True)


def _read_books(folder: Path) -> Any:
    found = numbers(codebooks.load(folder / "m").state_dict())
    texts = [(folder / "m" / name).read_text() for name in ("scores.json", "README.md")]
    assert len(set(texts)) == 1, "files of two sets"
    return found, texts[0]


def _write_index(folder: Path, seed: int) -> None:
    codebooks.CodeIndex.build(with_books(seed), data(seed), progress=False).save(folder / "i")


def _read_index(folder: Path) -> Any:
    found = codebooks.CodeIndex.load(folder / "i")
    return float(found.data.series.sum()), found.books[HOOK].values.indices.tolist()


def _write_notes(folder: Path, seed: int) -> None:
    codebooks.CodeNotes().add(f"note {seed}", HOOK, seed).save(folder / "notes.json")


def _read_notes(folder: Path) -> Any:
    return dict(codebooks.CodeNotes.load(folder / "notes.json").texts)


def _write_report(folder: Path, seed: int) -> None:
    storage.write_set({folder / "r.html": f"page {seed}", folder / "r.json": f"numbers {seed}"})


def _read_report(folder: Path) -> Any:
    page = (folder / "r.html").read_text()
    beside = folder / "r.json"
    # A kill between two renames may leave the page alone, but never beside another's numbers.
    assert not beside.exists() or beside.read_text()[-1] == page[-1], "files of two sets"
    return page


SAVED = {
    "model": Place(lambda f, s: model(s).save_pretrained(f / "m"), _read_model),
    "sae": Place(
        lambda f, s: saes.save(sae(s), f / "s"), lambda f: numbers(saes.load(f / "s").state_dict())
    ),
    "sae in a model": Place(_write_with_sae, _read_with_sae),
    "codebooks": Place(_write_books, _read_books),
    "index": Place(_write_index, _read_index),
    "notes": Place(_write_notes, _read_notes),
    "report": Place(_write_report, _read_report),
}


# ------------------------------------------------------------------ runs that keep their progress


def train(folder: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    source = training.ConvTST(
        n_channels=1, n_time=6, n_classes=2, conv_channels=(4, 4, 8), n_layers=1, n_heads=2, d_mlp=8
    )
    training.train(
        source, data(seed), epochs=3, val_fraction=0.25, checkpoint=folder / "run", progress=False
    )
    return numbers(source.state_dict())


def fit_codebooks(folder: Path, seed: int = 0) -> Any:
    made = model(seed)
    codebooks.fit(
        made,
        data(seed),
        [HOOK],
        n_codes=4,
        epochs=3,
        train_model=True,
        folder=folder / "run",
        progress=False,
    )
    return numbers(made.state_dict())


def fit_sae(folder: Path, seed: int = 0) -> Any:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    made = saes.fit(
        rows,
        d_sae=12,
        k=2,
        steps=6,
        batch_size=16,
        checkpoint=folder / "run",
        checkpoint_every=2,
        progress=False,
    )
    return numbers(made.state_dict())


def campaign(folder: Path, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    pairs = Pairs(*torch.randn(2, 2, 1, 6, generator=draw), torch.tensor([0, 1]))
    found = patching.run_campaign(
        model(seed),
        pairs,
        folder / "run",
        grids=[("z", ("layer", "head")), ("resid_post", ("layer",))],
        directions=["denoise"],
        figures=False,
        progress=False,
    )
    return [result.values.sum().item() for _, result in sorted(found.results.items())]


def harvest(folder: Path, seed: int = 0) -> Any:
    rows = ActivationRows(model(seed), data(seed), [HOOK])
    shards = harvest_to_disk(rows, folder / "run", shard_mb=0.001)
    found, _ = shards.read(range(len(shards.names)), set())
    return float(found[HOOK].double().sum()), len(shards.names)


RUNS = {
    "train": train,
    "codebooks": fit_codebooks,
    "sae": fit_sae,
    "campaign": campaign,
    "harvest": harvest,
}


def quiet(work: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return work()
