"""What people wrote about codes, as JSON that the browser page and Python share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tstlens import storage
from tstlens.arguments import checked
from tstlens.errors import ArgumentError, CorruptFileError

FORMAT, VERSION = "tstlens code notes", 1
Key = tuple[str, int, int | None, int]  # hook, group, head, code


def key_text(hook: str, group: int, head: int | None, code: int) -> str:
    """How a code is named in the file: "hook|group|head|code", head empty where there is none."""
    return f"{hook}|{group}|{'' if head is None else head}|{code}"


@dataclass(frozen=True)
class CodeNotes:
    """Notes on codes, by hook point, group, head and code.

    Args:
        texts: "hook|group|head|code" -> the note.

    Example:
        >>> notes = CodeNotes().add("a rising edge", "blocks.0.hook_mlp_out", 17)
        >>> notes.get("blocks.0.hook_mlp_out", 17)
        'a rising edge'
    """

    texts: Mapping[str, str] = field(default_factory=dict)

    @checked
    def get(self, hook: str, code: int, *, group: int = 0, head: int | None = None) -> str | None:
        """The note on a code, or None."""
        return self.texts.get(key_text(hook, group, head, code))

    @checked
    def add(
        self, text: str, hook: str, code: int, *, group: int = 0, head: int | None = None
    ) -> CodeNotes:
        """These notes with one more, or one replaced; an empty text takes it away."""
        if not isinstance(text, str):
            raise ArgumentError(f"expected a note as text, got {type(text).__name__}")
        key = key_text(hook, group, head, code)
        kept = {name: value for name, value in self.texts.items() if name != key}
        return CodeNotes({**kept, key: text} if text.strip() else kept)

    @checked
    def merge(self, other: CodeNotes) -> CodeNotes:
        """Both; where a code has two different notes, this one's comes first and both are kept."""
        texts = dict(self.texts)
        for key, text in other.texts.items():
            mine = texts.get(key)
            texts[key] = text if mine is None or mine in text else mine
            if mine is not None and mine not in text and text not in mine:
                texts[key] = f"{mine}\n{text}"
        return CodeNotes(texts)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write them as JSON, atomically; the page imports the file."""
        record = {"format": FORMAT, "format_version": VERSION, "notes": dict(self.texts)}
        text = storage.json_text(record, "notes", ensure_ascii=False)
        return storage.write_text(Path(path), text)

    @staticmethod
    @checked
    def load(path: str | Path) -> CodeNotes:
        """Notes that :meth:`save` or the page's export wrote.

        Raises:
            StorageError: there is no such file.
            CorruptFileError: it does not hold notes.
            ConfigVersionError: a newer tstlens wrote it.
        """
        path = Path(path)
        record = storage.read_json(path, "notes on codes", format=FORMAT, version=VERSION)
        texts = record.get("notes")
        if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
            raise CorruptFileError(f"{path}: expected notes as text by code")
        return CodeNotes(texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)
