"""From a checkpoint and a data set to a saved model with codebooks, with its scores beside it.

Models with codebooks on disk: a model's folder with its codebooks under ``saes/``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tstlens import storage
from tstlens.arguments import checked
from tstlens.codebooks.fitting import FittedCodebooks, fit
from tstlens.codebooks.scores import CodebookScores, score
from tstlens.data import load_described
from tstlens.errors import ArgumentError, UnknownCheckpointError
from tstlens.model import HookedTST
from tstlens.model.folders import find_checkpoint
from tstlens.model.saving import as_model, save_with
from tstlens.saes.dictionaries import FOLDER, list_saes
from tstlens.saes.dictionaries import load as load_dictionary

SHIPPED = "codebooks"  # folder of a checkpoint that holds it tuned, with codebooks


@checked
def load(
    name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> HookedTST:
    """A model that was fitted together with codebooks, with them on.

    Args:
        name: a shipped checkpoint that has such a model beside it, or a folder that
            ``model.save_pretrained`` wrote while codebooks were on the model.
        device: where to put it.
        dtype: what to cast it to.

    Returns:
        The model in eval mode. ``model.reset_codebooks()`` leaves the tuned weights alone, which
        are not those of the checkpoint.

    Raises:
        UnknownCheckpointError: nothing goes by that name, or no codebooks are there.
        CorruptFileError: weights or tables are truncated or altered.

    Example:
        >>> from tstlens import codebooks
        >>> list(codebooks.load("japanese-vowels").acts_to_codebooks)
        ['blocks.0.hook_normalized_resid_post', 'blocks.1.hook_normalized_resid_post']
    """
    folder = find_checkpoint(name)
    folder = folder / SHIPPED if (folder / SHIPPED).is_dir() else folder
    hooks = list_saes(folder)
    model = HookedTST.from_pretrained(folder, device=device, dtype=dtype)
    books = {hook: load_dictionary(folder / FOLDER / hook, device=device) for hook in hooks}
    books = {hook: book for hook, book in books.items() if hasattr(book, "trace")}
    if not books:
        raise UnknownCheckpointError(
            str(name), [], f"{folder} holds a model without codebooks; fit them: codebooks.fit"
        )
    for hook, book in books.items():
        model.add_codebook(book.to(model.cfg.dtype), hook)
    return model


SCORES, README = "scores.json", "README.md"


@checked
def make_codebooks(
    model: HookedTST | str | Path,
    hooks: list[str],
    folder: str | Path,
    *,
    sae_steps: int = 1000,
    checkpoint: str | Path | None = None,
    command: str = "",
    overwrite: bool = False,
    **options: Any,
) -> tuple[FittedCodebooks, CodebookScores]:
    """Fit codebooks on a model's own training split, score them on its test split, save both.

    Args:
        model: the model, or a name or folder of one; it is left as it was.
        hooks: the hook points.
        folder: where to: the tuned model, its codebooks, ``scores.json`` and ``README.md``.
        sae_steps: of the SAEs that are scored beside the codebooks; 0 for none.
        checkpoint: keeps the fit's progress; a fit found there is continued.
        command: how to do this again, for the README.
        overwrite: replace a model that is in the folder already.
        **options: of :func:`fit`.

    Raises:
        ArgumentError: the folder holds a model already, or the model does not say which data it was
            trained on.
        StorageError: the folder cannot be written.
    """
    folder = Path(folder)
    if not overwrite and (folder / "config.json").exists():
        raise ArgumentError(
            f"{folder} holds a model already; choose another folder, or overwrite=True "
            "(--overwrite) to replace it"
        )
    storage.check_folder(folder, "the model")
    original = as_model(model)
    described = original.info.get("data", {})
    train, test = (load_described(described, split) for split in ("train", "test"))
    tuned = copy.deepcopy(original)
    books = fit(tuned, train, hooks, folder=checkpoint, **options)
    seed = books.settings["seed"]
    scores = score(tuned, test, original=original, train=train, sae_steps=sae_steps, seed=seed)
    tuned.info = {**original.info, "codebooks": {"fit": books.settings, "scores": scores.task}}
    tuned.parity = None  # of the weights before they were tuned
    record = {**scores.to_dict(), "history": books.history, "command": command}
    shipped = folder.name == SHIPPED and folder.parent.name == tuned.cfg.model_name
    called = str(tuned.cfg.model_name) if shipped else folder.as_posix()
    texts = {SCORES: storage.json_text(record, "scores")}
    texts[README] = _readme(tuned, books, scores, called, command)
    save_with(tuned, folder, texts, only_spliced=True)  # those of another fit would stay
    return books, scores


def _readme(
    model: HookedTST, books: FittedCodebooks, scores: CodebookScores, called: str, command: str
) -> str:
    settings = books.settings
    measure = next(iter(scores.task["codebooks"]))
    shown = (lambda value: f"{value:.2%}") if measure == "accuracy" else (lambda v: f"{v:.4g}")
    together = "tuned together with" if settings["train_model"] else "frozen, beside"
    lines = [
        f"# {storage.plain(model.cfg.model_name)} with codebooks",
        "",
        f"The model, {together} codebooks at {', '.join(f'`{name}`' for name in books)}: "
        f"{settings['n_codes']} codes per table, {settings['k']} active at once, "
        f"{settings['similarity']} similarity, seed {settings['seed']}.",
        "",
        f"Measured on {storage.plain(scores.data)}, {scores.n_series} series:",
        "",
        f"| model | {measure} | explained variance | codes used | bits per position |",
        "|---|---|---|---|---|",
    ]
    for row, task in scores.task.items():
        found = scores.books.get(row, ())
        cells = [
            ", ".join(f"{book.explained_variance:.1%}" for book in found),
            ", ".join(f"{book.n_codes - book.dead} of {book.n_codes}" for book in found),
            ", ".join(f"{book.bits:.0f}" for book in found),
        ]
        lines.append(f"| {row} | {shown(task[measure])} | {' | '.join(cells)} |")
    lines += [
        "",
        "Several numbers in a cell belong to the hook points in the order above. Where random "
        "tables do as well as fitted ones, the task does not need these activations, and the first "
        "column says little.",
        "",
        storage.fenced(
            f"from tstlens import codebooks\n\nmodel = codebooks.load({storage.quoted(called)})",
            "python",
        ),
    ]
    if command:
        lines += ["", "Made with:", "", storage.fenced(command, "sh")]
    return "\n".join(lines) + "\n"
