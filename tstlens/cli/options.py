"""What commands take: the options that several share, and those that a config class has fields for.

The class is read from its source and never imported: help should wait for no torch, and be there
without sae-lens.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge

import tstlens


def argument(help: str) -> Any:
    """What is given by its place."""
    return typer.Argument(help=help, show_default=False)


def option(help: str, *names: str, **bounds: Any) -> Any:
    """An option: its line of help, its names where they are others, the bounds of its value."""
    return typer.Option(*names, help=help, **bounds)


Model = Annotated[str, argument("A shipped checkpoint, a folder, or a hub id.")]
Data = Annotated[str | None, option("Data set; by default the checkpoint's own.")]
Resume = Annotated[Path | None, option("Folder to keep progress in; a run there is continued.")]
Overwrite = Annotated[bool, option("Replace what is in the folder already.", "--overwrite")]
Quiet = Annotated[bool, option("No progress bar.", "--quiet")]


def settings_of(config: str, *without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For ``command(..., **settings)``: settings are the fields of a config class, as options.

    Name, type, lower bound and default of an option are the field's, its help is the first sentence
    that the class's docstring has on it. The config itself checks the rest.

    Args:
        config: where the class is: ``"tstlens.codebooks.fitting.FitConfig"``.
        *without: fields that the command says otherwise. Left out too are those that it has a
            parameter for, and those whose values are no words: objects, or None in place of a
            number that is the default.
    """
    module, _, name = config.rpartition(".")

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        said = {*without, *(parameter.name for parameter in own)}
        fields = [field for field in _fields(module, name) if field.name not in said]

        command.__signature__ = inspect.Signature([*own, *fields])  # type: ignore[attr-defined]
        return command

    return decorate


class _Source(dict[str, Any]):
    """Names at the top of a module of ours, as far as they are types made of Python's own."""

    def __init__(self, module: str) -> None:
        path = Path(tstlens.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        self.text = path.read_text(encoding="utf-8")

    def __missing__(self, name: str) -> Any:
        imported = rf"^from (\S+) import (?:\([^)]*|.*)\b{name}\b"
        home = found[1] if (found := re.search(imported, self.text, re.MULTILINE)) else ""
        if found := re.search(rf"^{name} = (.+)$", self.text, re.MULTILINE):
            self[name] = self.value(found[1])
        elif home in ("typing", "annotated_types"):
            self[name] = getattr(import_module(home), name)
        elif home.startswith("tstlens."):
            self[name] = _source(home)[name]
        else:
            raise KeyError(name)  # Python goes on to its own names
        return self[name]

    def value(self, expression: str) -> Any:
        """What an expression stands for here. Raises NameError where it takes more than types."""
        return eval(expression, {}, self)


_source = functools.cache(_Source)


def _fields(module: str, name: str) -> Iterator[inspect.Parameter]:
    """The fields of a dataclass that can be said on the command line."""
    source = _source(module)
    body = re.search(rf"^class {name}\b.*(?:\n(?: .*)?)*", source.text, re.MULTILINE)
    (kind,) = ast.parse(body[0] if body else "").body
    docstring = ast.get_docstring(kind) or ""  # type: ignore[arg-type]
    about = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", docstring, re.MULTILINE))
    for node in kind.body:  # type: ignore[attr-defined]
        match node:
            case ast.AnnAssign(target=ast.Name(id=field), value=ast.expr() as value):
                try:
                    hint, default = map(source.value, map(ast.unparse, (node.annotation, value)))
                except NameError:
                    continue
                if taken := _option(hint, default, field, _first_sentence(about[field])):
                    keyword = inspect.Parameter.KEYWORD_ONLY
                    yield inspect.Parameter(field, keyword, default=default, annotation=taken)


def _option(hint: Any, default: Any, field: str, help: str) -> Any:
    """A field's annotation as typer takes it; None where no word stands for its values."""
    may_be_none = type(None) in get_args(hint)
    allowed = [one for one in get_args(hint) if one is not type(None)] if may_be_none else [hint]
    kind, *bounds = get_args(allowed[0]) if get_origin(allowed[0]) is Annotated else allowed[:1]
    is_word = kind in (int, float, str, bool) or get_origin(kind) is Literal
    if len(allowed) > 1 or not is_word or (may_be_none and default is not None):
        return None
    names = ["--" + field.replace("_", "-")] if default is False else []  # no --no-field
    least = [bound.ge for bound in bounds if isinstance(bound, Ge)]
    taken = option(help, *names, rich_help_panel="Settings", min=least[0] if least else None)
    return Annotated[kind | None if may_be_none else kind, taken]


def _first_sentence(text: str) -> str:
    """Without markup."""
    words = re.split(r"(?<=\.) ", " ".join(text.split()))[0]
    words = re.sub(r"(?::\w+:)?`+([^`]*)`+", r"\1", words)
    return words[:1].upper() + words[1:]
