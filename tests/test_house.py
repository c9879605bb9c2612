"""The rules of the house: who imports whom, what import costs, what public names owe the reader."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import tstlens
from tstlens import errors
from tstlens.lazy import typed_imports

PACKAGE = Path(__file__).resolve().parents[1] / "tstlens"

# Shared by every room; these import from each other only.
BASE = {
    "arguments",
    "effects",
    "errors",
    "family_index",
    "lazy",
    "metrics",
    "points",
    "randomness",
    "results",
    "run",
    "shapes",
    "stats",
    "storage",
}
# Each room imports from itself, from BASE and from rooms further up this list.
ROOMS = [
    {"data"},
    {"training"},
    {"model"},
    {"zoo"},
    {"patching", "codebooks", "saes", "probing"},
    {"figures"},
    {"report"},
    {"truth"},
    {"cli", "conversion"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
# Analyses do not import each other, but codebooks are dictionaries, as SAEs are.
ALSO_ALLOWED = {("codebooks", "saes")}
# A result knows how to become a figure; it looks for the figures when it is asked to.
ALLOWED_INSIDE_A_FUNCTION = {("results", "figures"): {"figure", "to_html"}}

NEEDS_SAE_LENS = {"saes", "codebooks"}
GONE_IN_TRANSFORMER_LENS_4 = {
    "BertNextSentencePrediction",
    "HookedAudioEncoder",
    "HookedEncoder",
    "HookedEncoderDecoder",
    "HookedTransformer",
    "HookedTransformerConfig",
    "components",
    "loading",
    "loading_from_pretrained",
    "train",
    "utils",
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


def room_of(path: Path) -> str:
    """``tstlens/data/pairs.py`` and ``tstlens/data.py`` are both in the room ``data``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted_imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported name in full, with its statement: ``from a import b`` gives ``a.b``."""
    folders = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            above = folders[: len(folders) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node


def room_of_import(dotted: str) -> str | None:
    """The room that an import reaches into; None for what is not ours, or the bare package."""
    first, _, rest = dotted.partition(".")
    name = rest.partition(".")[0]
    if first != "tstlens" or not name or name == "__version__":
        return None
    home = typed_imports("tstlens").get(name, (None, None))
    return name if home[1] is None else home[0].split(".")[1]


def enclosing_function(path: Path, statement: ast.stmt) -> str | None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and statement in ast.walk(node):
            return node.name
    return None


def may_import(path: Path, statement: ast.stmt, other: str) -> bool:
    room = room_of(path)
    if other == room or other in BASE or (room, other) in ALSO_ALLOWED:
        return True
    if room in BASE:
        functions = ALLOWED_INSIDE_A_FUNCTION.get((room, other), set())
        return enclosing_function(path, statement) in functions
    return RANK.get(other, len(ROOMS)) < RANK[room]


def test_every_file_has_its_room():
    rooms = BASE | set(RANK) | {"__init__"}
    strangers = [name_of(path) for path in sources() if room_of(path) not in rooms]
    assert not strangers, f"no room for these in tests/test_house.py: {strangers}"


def test_imports_point_to_the_left():
    against = [
        f"{name_of(path)}:{node.lineno} imports {dotted}"
        for path in sources()
        if room_of(path) != "__init__"
        for dotted, node in dotted_imports(path)
        if (other := room_of_import(dotted)) is not None and not may_import(path, node, other)
    ]
    assert not against, "a folder imports only from those to its left:\n" + "\n".join(against)


def test_the_page_on_the_house_has_its_rooms_in_order(repository):
    page = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1].strip() for row in page.splitlines() if row.startswith("| ")][1:]
    drawn = [set(row.split(", ")) for row in rows]
    assert drawn == [{"base"}, *(rooms - {"conversion"} for rooms in ROOMS)]
    named = set(re.findall(r"`(\w+)\.py`", page.splitlines()[6]))
    assert named == BASE


def test_what_the_page_on_the_house_names_is_there(repository):
    page = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", page))
    missing = [
        path for path in paths if not (PACKAGE / path).exists() and not (repository / path).exists()
    ]
    assert paths and not missing


def test_the_walk_sees_an_import_that_points_to_the_right(tmp_path, monkeypatch):
    package = tmp_path / "tstlens"
    (package / "data").mkdir(parents=True)
    wrong = package / "data" / "pairs.py"
    lines = [
        "def f():",
        "    from ..model import HookedTST",
        "    from tstlens import patching",
        "",
    ]
    wrong.write_text("\n".join(lines))
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    found = {
        room_of_import(dotted)
        for dotted, node in dotted_imports(wrong)
        if not may_import(wrong, node, room_of_import(dotted) or "")
    }
    assert found == {"model", "patching"}


def test_sae_lens_is_imported_by_its_own_rooms_only():
    elsewhere = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        if room_of(path) not in NEEDS_SAE_LENS and path.stem != "sae_recovery"
        for dotted, node in dotted_imports(path)
        if dotted.split(".")[0] == "sae_lens"
    ]
    assert not elsewhere, f"sae_lens does not import beside TransformerLens 4: {elsewhere}"


def test_nothing_that_transformer_lens_4_removed_is_used():
    used = [
        f"{name_of(path)}:{node.lineno} {dotted}"
        for path in sources()
        for dotted, node in dotted_imports(path)
        if dotted.startswith("transformer_lens.")
        and (
            dotted.split(".")[1] in GONE_IN_TRANSFORMER_LENS_4
            or dotted == "transformer_lens.hook_points.HookedRootModule"
        )
    ]
    used += [
        f"{name_of(path)}:{node.lineno} transformer_lens.{node.attr}"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "transformer_lens"
        and node.attr in GONE_IN_TRANSFORMER_LENS_4
    ]
    assert not used, "\n".join(used)


def test_no_assert_in_the_package():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assert)
    ]
    assert not found, f"input is checked with exceptions that say what to do: {found}"


def test_only_the_command_line_prints():
    found = [
        f"{name_of(path)}:{node.lineno}"
        for path in sources()
        if room_of(path) != "cli"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not found, found


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after ``statement``."""
    names = "' '.join({m.split('.')[0] for m in sys.modules})"
    return set(printed_by(f"{statement}; import sys; print({names})").split())


def printed_by(code: str) -> str:
    """What a fresh interpreter prints."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return run.stdout


def test_import_tstlens_loads_nothing_heavy():
    heavy = {
        "aeon",
        "jaxtyping",
        "numpy",
        "pandas",
        "plotly",
        "sae_lens",
        "scipy",
        "sklearn",
        "torch",
        "transformer_lens",
        "transformers",
    }
    assert not heavy & loaded_by("import tstlens")


def test_loading_a_model_loads_few_modules():
    load = "import tstlens; tstlens.HookedTST.from_pretrained('japanese-vowels')"
    code = f"{load}; import sys; print(sum(name.startswith('tstlens') for name in sys.modules))"
    assert int(printed_by(code)) <= 38


@pytest.mark.parametrize("command", ["--help", "families", "checkpoints"])
def test_what_only_lists_is_fast(command):
    code = f"""
import sys, contextlib, io, tstlens.cli
sys.argv = ["tstlens", {command!r}]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    tstlens.cli.main()
print(" ".join({{"torch", "transformer_lens", "numpy"}} & set(sys.modules)))
"""
    assert not printed_by(code).strip()


def test_the_rooms_load_data_sets_figures_and_saes_on_first_use():
    rooms = "from tstlens import data, model, patching, training, truth, zoo"
    assert not {"aeon", "plotly", "sae_lens"} & loaded_by(rooms)


def packages() -> list[str]:
    return sorted(
        ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for path in PACKAGE.rglob("__init__.py")
    )


def imported(package: str) -> ModuleType:
    if set(package.split(".")) & NEEDS_SAE_LENS:
        pytest.importorskip("sae_lens")
    return importlib.import_module(package)


@pytest.mark.parametrize("package", packages())
def test_public_names_resolve_and_are_documented(package):
    module = imported(package)
    assert inspect.getdoc(module), f"{package} does not say what it is for"
    public = getattr(module, "__all__", None)
    assert public is not None, f"{package} does not list its public names in __all__"
    assert len(set(public)) == len(public)
    for name in public:
        without = importlib.util.find_spec("sae_lens") is None
        try:
            value = getattr(module, name)
        except ImportError:
            # The public names that need an extra.
            assert without and package in {"tstlens", "tstlens.truth"}, name
            continue
        ours = getattr(value, "__module__", "") or ""
        if not ours.startswith("tstlens") or not callable(value):
            continue  # a constant, or an alias of somebody else's type
        doc = value.__doc__ or ""
        # A dataclass without a docstring is given its signature as one.
        assert doc and not doc.startswith(f"{name}("), f"{package}.{name} has no docstring"


def test_dir_lists_every_public_name_before_anything_is_imported():
    code = "import tstlens; missing = set(tstlens.__all__) - set(dir(tstlens)); assert not missing"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_an_unknown_name_is_an_attribute_error_as_usual():
    with pytest.raises(AttributeError, match="module 'tstlens' has no attribute 'HookedTSS'"):
        tstlens.HookedTSS  # noqa: B018
    assert not hasattr(tstlens, "__wrapped__")


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Name -> (parent, builtin in brackets), as the docstring of tstlens.errors draws it."""
    line = re.compile(r"^(?P<rails>[ │├└─]*)(?P<name>\w+Error)\b(?: \((?P<builtin>\w+)\))?")
    branch: list[str] = []
    tree: dict[str, tuple[str | None, str | None]] = {}
    for text in (inspect.getdoc(errors) or "").splitlines():
        found = line.match(text.removeprefix("    "))
        if found:
            depth = len(found["rails"]) // 4
            tree[found["name"]] = (branch[depth - 1] if depth else None, found["builtin"])
            branch[depth:] = [found["name"]]
    return tree


def test_the_exceptions_are_the_tree_that_is_drawn():
    defined = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    tree = drawn_tree()
    assert set(defined) == set(tree)
    for name, (parent, builtin) in tree.items():
        bases = [base.__name__ for base in defined[name].__bases__]
        assert bases == [base for base in (parent or "Exception", builtin) if base], name
        assert defined[name].__doc__, name


def test_one_version_everywhere(repository):
    citation = (repository / "CITATION.cff").read_text()
    assert f"\nversion: {tstlens.__version__}\n" in citation
    assert f"\n## [{tstlens.__version__}]" in (repository / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("tstlens")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == tstlens.__version__
