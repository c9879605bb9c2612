"""What an argument has to be, read off its annotation before an analysis begins.

``@checked`` turns the annotations of a public function into an error that names the argument, what
was expected, what came and what to do, so that no caller meets torch's or numpy's own words for a
list where a tensor belongs, and a word that a ``Literal`` does not list is refused with those that
it does. Shapes, and what depends on another argument, are checked where they are used.

Numbers have to be finite, within the bounds that their annotation gives (``Count``, ``Seed``,
``Share`` …), and no booleans; a string is no sequence of names. What says the same without a loss
is taken as what it says: numpy's numbers and arrays without axes as Python's, and, where a sequence
belongs, arrays, iterators and views of dictionaries as the entries that they hold. Annotations that
are not known at run time and parameters without one are let through.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import numbers
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from tstlens.errors import ArgumentError, InputError, LabelError, SeriesShapeError, SeriesValueError
from tstlens.lazy import typed_imports

Function = TypeVar("Function", bound=Callable[..., Any])
Test = Callable[[Any], bool]
_UNIONS = (typing.Union, types.UnionType)  # noqa: TID251 (X | Y makes either)

MOST = 2**31 - 1  # of anything counted; torch's generators take larger seeds
Count = Annotated[int, Ge(1), Le(MOST)]
Amount = Annotated[int, Ge(0), Le(MOST)]
Draws = Annotated[int, Ge(100), Le(MOST)]  # an interval's ends are noise below
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Gt(0), Lt(1)]

# What to do about a missing object, by the name of its class.
_ADVICE = {
    "HookedTST": "load one with HookedTST.from_pretrained(name), or tstlens.convert(yours)",
    "TimeSeriesData": "wrap series (and labels): TimeSeriesData(series, labels)",
    "Pairs": "make some with tstlens.data.misclassified_pairs or class_pairs",
    "Metric": "patching.log_prob(target), say",
    "SAE": "saes.load(name, hook) loads one, saes.train(model, data, hook) makes one",
}
_SEQUENCES = (Sequence, Iterable, list, tuple, set)
_ARRAY_ERRORS: dict[str, type[InputError]] = {"bool": SeriesShapeError, "int": LabelError}


def checked(function: Function) -> Function:
    """The function, with the types of its arguments checked at every call.

    While it runs, no other thread runs a model that is among them, or hooks it.

    Args:
        function: annotated; not a class.

    Example:
        >>> @checked
        ... def top(n: Count = 5, seed: Seed = 0) -> int: return n
        >>> top("7")
        Traceback (most recent call last):
        ...
        tstlens.errors.ArgumentError: expected n as an integer of at least 1, got '7'
    """
    names = tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        # What follows ``*args`` cannot be meant by the next argument without a name.
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
    of_pairs = {"model", "pairs"} <= inspect.signature(function).parameters.keys()

    @functools.cache
    def tests() -> dict[str, tuple[Any, Test]]:
        return {name: (hint, _test(hint)) for name, hint in _hints(function).items()}

    def taken(name: str, value: Any) -> Any:
        return _read(name, *tests()[name], value) if name in tests() else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        read = [*map(taken, names, args), *args[len(names) :]]
        kwargs = {name: taken(name, value) for name, value in kwargs.items()}
        if of_pairs:
            given = {**dict(zip(names, read, strict=False)), **kwargs}
            if hasattr(given.get("pairs"), "check_model"):
                given["pairs"].check_model(given.get("model"))
        turns = {id(turn): turn for value in (*read, *kwargs.values()) if (turn := _turn_of(value))}
        if not turns:
            return function(*read, **kwargs)
        with ExitStack() as stack:
            # In one order, or two threads would wait for each other.
            for _, turn in sorted(turns.items()):
                stack.enter_context(turn)
            return function(*read, **kwargs)

    call.taken = taken  # type: ignore[attr-defined]  # what one argument is taken as, or its error
    return typing.cast(Function, call)


def configured(kind: type, rest: str | None = None) -> Callable[[Function], Function]:
    """For ``function(..., config: Kind | None = None, **settings)``: settings are Kind's fields.

    Fields given as keywords replace those of ``config`` (of ``Kind()`` where that is None), so the
    function reads ``config`` alone. They stand in its signature, and a keyword that is no field
    is refused with the one that is meant. A subclass of Kind as ``config`` brings its own fields.

    Args:
        kind: a frozen dataclass whose fields all have defaults; it checks them, see
            :func:`check_fields`.
        rest: the field, a dict, that takes the keywords which are no field; without one they are
            refused.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options: n_codes: Count = 256
        >>> @configured(Options)
        ... def fit(data, config: Options | None = None, **settings): return config.n_codes
        >>> fit([1], n_codes=64)
        64
    """

    def decorate(function: Function) -> Function:
        defaults = kind()
        plain = inspect.signature(function)
        own = [one for one in plain.parameters.values() if one.kind is not one.VAR_KEYWORD]
        names = {one.name for one in own}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            settings = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
            given = plain.bind(*args, **kwargs)
            config = given.arguments.get("config")
            config = defaults if config is None else config
            if not isinstance(config, kind):
                raise ArgumentError(
                    f"expected config as {_phrase(kind, None)}, got {shown(config)}"
                )
            known = [field.name for field in fields(config) if field.init]
            if rest is not None:
                others = {name: settings.pop(name) for name in list(settings) if name not in known}
                settings[rest] = {**settings.get(rest, getattr(config, rest)), **others}
            tests = _field_tests(type(config))
            for name in settings:
                if name in known:  # named as the keyword that it came as
                    settings[name] = _read(name, *tests[name], settings[name])
                    continue
                close = difflib.get_close_matches(name, [*known, *names], 1)
                meant = f"; did you mean {close[0]!r}?" if close else ";"
                raise ArgumentError(
                    f"{function.__name__} has no option {name!r}{meant} it has {', '.join(known)}"
                )
            given.arguments["config"] = replace(config, **settings)
            return function(*given.args, **given.kwargs)

        options = [
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(defaults, one.name),
                annotation=one.type,
            )
            for one in fields(kind)
            if one.init and one.name not in names
        ]
        call.__signature__ = plain.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return typing.cast(Function, call)

    return decorate


def needs_gradients(function: Function) -> Function:
    """The function, refusing at once where torch records no gradients for its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        check_gradients(function.__name__, *args, *kwargs.values())
        return function(*args, **kwargs)

    return typing.cast(Function, call)


def check_gradients(what: str, *given: Any) -> None:
    """Raise :class:`ArgumentError` in ``torch.inference_mode()``, or for what was made in it.

    Args:
        what: needs gradients.
        given: tensors, modules, or records of tensors; anything else is passed over.
    """
    advice = "leave it, or take torch.no_grad(), which can be switched off for a while"
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{what} needs gradients, and torch.inference_mode() rules them out; {advice}"
        )
    for value in given:
        parts = value.parameters() if isinstance(value, torch.nn.Module) else [value]
        parts = [*parts, *getattr(value, "__dict__", {}).values()]
        if any(isinstance(part, Tensor) and part.is_inference() for part in parts):
            raise ArgumentError(
                f"{what} needs gradients, and a {type(value).__name__} among its arguments was "
                "made under torch.inference_mode(), which rules them out; make it outside, or "
                "under torch.no_grad()"
            )


def _turn_of(value: Any) -> Any:
    """The turn of a model, see ``tstlens.model.hooking``; None for anything else."""
    return getattr(value, "__dict__", {}).get("_turn")


def warn(message: str) -> None:
    """A UserWarning that names the line of the user's own that led here."""
    frame, level = sys._getframe(), 1
    ours = ("tstlens", "jaxtyping", "beartype")  # the latter wrap our functions in the tests
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def check_slice(index: slice, size: int, name: str) -> None:
    """Refuse a slice that reaches past an axis of ``size`` entries, or that selects none of them.

    Raises:
        ArgumentError: Python would have cut it to what there is without a word.
    """
    ends = [end for end in (index.start, index.stop) if end is not None]
    if not all(_is_number(end, numbers.Integral) and -size <= end <= size for end in ends):
        raise ArgumentError(f"expected {name} within 0..{size}, got {index}")
    if not range(size)[index]:
        raise ArgumentError(f"{name}={index} selects nothing of 0..{size - 1}")


def one_per_row(values: Any, output: Tensor, name: str) -> Tensor:
    """What a function of the user's own gave for outputs [row, ...], as finite numbers [row].

    Args:
        values: what it gave: a tensor, or what becomes one.
        output: the model's outputs.
        name: of the argument that the function was passed as.

    Raises:
        ArgumentError: not one number per row, or NaN or infinity, which nothing can be ranked by.
    """
    found = numbers_of_rows(values, output, name)
    check_finite(found, name)
    return found


def numbers_of_rows(values: Any, output: Tensor, name: str) -> Tensor:
    """As :func:`one_per_row`, without looking at the numbers, for which a GPU has to be waited."""
    expected = f"expected {name} to give one value per series [{len(output)}]"
    try:
        found = torch.as_tensor(values, device=output.device)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{expected}, got {shown(values)}") from None
    if found.is_complex():
        raise ArgumentError(f"{expected}, got {found.dtype}; take the real part or the size")
    if found.shape != output.shape[:1]:
        raise ArgumentError(f"{expected}, got {list(found.shape)}")
    return found if found.is_floating_point() else found.to(output.dtype)


def check_finite(found: Tensor, name: str, first: int | None = 0) -> None:
    """Raise :class:`ArgumentError` for NaN or infinity in what a function gave [..., row].

    Args:
        found: what it gave.
        name: of the function.
        first: number of the first row among all series; None where that is not known.
    """
    if not bool(found.isfinite().all()):
        at = tuple((~found.isfinite()).nonzero()[0].tolist())
        which = f"row {at[-1]} of a batch" if first is None else f"series {first + at[-1]}"
        raise ArgumentError(
            f"expected {name} to give finite values, got {float(found[at])} for {which}; where the "
            "model's own output is not finite, leave that series out or scale it as the training "
            "data were; where a log of a probability is taken, take log_softmax"
        )


def check_fields(record: Any) -> None:
    """Check the fields of a dataclass as :func:`checked` does arguments; for ``__post_init__``."""
    for name, (hint, test) in _field_tests(type(record)).items():
        value = getattr(record, name)
        read = _read(f"{type(record).__name__}.{name}", hint, test, value)
        if read is not value:
            object.__setattr__(record, name, read)  # the dataclass may be frozen


@functools.cache
def _field_tests(kind: type) -> dict[str, tuple[Any, Test]]:
    hints: dict[str, Any] = {}
    for part in reversed(kind.__mro__):  # a field may be inherited
        hints |= _hints(part) if is_dataclass(part) else {}
    return {name: (hint, _test(hint)) for name, hint in hints.items()}


def _hints(annotated: Any) -> dict[str, Any]:
    """Resolved annotations of arguments, without those that cannot be known here."""
    plain = inspect.unwrap(annotated)
    space, found = vars(sys.modules[plain.__module__]), {}
    for name, hint in getattr(plain, "__annotations__", {}).items():
        if name != "return":
            try:
                # Our own code; a name that only type checkers import is looked up where it is.
                local = _TypedImports(plain.__module__)
                found[name] = eval(hint, space, local) if isinstance(hint, str) else hint
            except NameError:
                continue
    return found


class _TypedImports(dict[str, Any]):
    """What a module imports under ``if TYPE_CHECKING:``, imported once it is asked for."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __missing__(self, name: str) -> Any:
        if name in vars(sys.modules[self.module]):
            raise KeyError(name)  # nothing of ours: Python goes on to the module's own names
        home, original = typed_imports(self.module)[name]
        module = importlib.import_module(home)
        return module if original is None else getattr(module, original)


def _read(name: str, hint: Any, test: Test, value: Any) -> Any:
    """The value, or what says the same and is what the annotation says; else the error."""
    if isinstance(value, np.generic) and hint is not Any:
        value = value.item()
    # What cannot even be looked at (a sparse tensor's entries, a list 10,000 deep) does not fit.
    with suppress(Exception):
        if test(value):
            return value
    with suppress(Exception):
        for other in _readings(hint, value):
            if test(other):
                return other
    raise _error(name, hint, value)


def _readings(hint: Any, value: Any) -> Iterator[Any]:
    """What else a value says, without a loss; sets are left out, as they have no order."""
    if getattr(value, "ndim", None) == 0:
        yield value.tolist()
        return
    if not any(get_origin(option) in _SEQUENCES for option in _options(hint)):
        return
    if hasattr(value, "tolist"):  # arrays of torch, numpy and pandas
        if getattr(value, "ndim", 1) > 1:
            yield list(value)
        value = value.tolist()
    elif isinstance(value, Iterator | KeysView | ValuesView):
        value = list(value)
    elif not isinstance(value, list | tuple | range):
        return
    yield value
    yield tuple(value)
    yield [tuple(entry) if isinstance(entry, list) else entry for entry in value]


def _test(hint: Any) -> Test:
    """Whether a value is what an annotation says."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if origin in _UNIONS:
        options = [_test(option) for option in inside]
        return lambda value: any(option(value) for option in options)
    if hint is None or hint is type(None):
        return lambda value: value is None
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in inside
    if origin is Annotated:
        base, bounds = _test(inside[0]), inside[1:]
        return lambda value: base(value) and all(_is_within(value, bound) for bound in bounds)
    if hint is str:
        return lambda value: isinstance(value, str)
    if hint is bool:
        return lambda value: isinstance(value, bool | np.bool_)
    if hint is int:
        return lambda value: _is_number(value, numbers.Integral)
    if hint is float:
        return lambda value: _is_number(value, numbers.Real) and -math.inf < value < math.inf
    if isinstance(hint, type) and hasattr(hint, "array_type"):  # jaxtyping's
        kind: Any = hint.array_type
        if _is_bools(hint):  # integers would pick rows 0 and 1 in place of masking
            return lambda value: isinstance(value, kind) and _dtype(value) == "bool"
        return lambda value: isinstance(value, kind) and "complex" not in _dtype(value)
    if hint is Tensor:
        return lambda value: isinstance(value, Tensor) and not value.is_complex()
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return lambda value: isinstance(value, os.PathLike)
    if origin in _SEQUENCES:
        return _sequence_test(origin, inside)
    if origin in (Mapping, dict):
        return lambda value: isinstance(value, Mapping)
    if origin is Callable or hint is Callable:
        return lambda value: callable(value) and not isinstance(value, type)
    if isinstance(origin, type):  # SAE[Any]
        return lambda value: isinstance(value, origin)
    if isinstance(hint, type):
        return lambda value: isinstance(value, hint)
    return lambda value: True


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _sequence_test(kind: type, inside: tuple[Any, ...]) -> Test:
    fixed = kind is tuple and ... not in inside
    tests = [_test(one) for one in inside if one is not ...]

    def fits(value: Any) -> bool:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, kind):
            return False
        # An iterator could be read once only: its entries are left to the function.
        if not tests or isinstance(value, Iterator):
            return True
        if fixed and len(value) != len(tests):
            return False
        if isinstance(value, range):  # as good as its ends
            value = [*value[:1], *value[-1:]]
        each = tests if fixed else tests * len(value)
        return all(test(entry) for test, entry in zip(each, value, strict=False))

    return fits


def _is_within(value: Any, bound: Any) -> bool:
    match bound:
        case Ge(ge=end):
            return value >= end
        case Gt(gt=end):
            return value > end
        case Le(le=end):
            return value <= end
        case Lt(lt=end):
            return value < end
    return True


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _error(name: str, hint: Any, value: Any) -> InputError:
    advice = _advice(name, hint, value)
    words = _words(hint, value)
    message = f"expected {name} as {words}, got {shown(value)}"
    if isinstance(value, Tensor) and any(_is_bools(option) for option in _options(hint)):
        message = f"expected a bool mask as {name}, {words}, got {shown(value)}"
    return _error_kind(hint)(message + (f"; {advice}" if advice else ""))


def _error_kind(hint: Any) -> type[InputError]:
    arrays = [option for option in _options(hint) if hasattr(option, "array_type")]
    if not arrays:
        return ArgumentError
    return _ARRAY_ERRORS.get(_kind_of_array(arrays[0]), SeriesValueError)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in _UNIONS else (hint,)


def _kind_of_array(hint: Any) -> str:
    return {"Bool": "bool", "Int": "int"}.get(hint.__name__.split("[")[0], "float")


def _words(hint: Any, value: Any = None) -> str:
    """An annotation in English, as far as the value does not fit it."""
    words = dict.fromkeys(word for option in _options(hint) for word in _word(option, value))
    *others, last = words
    return " or ".join(filter(None, [", ".join(others), last]))


def _word(hint: Any, value: Any) -> list[str]:
    """One phrase, or one per choice."""
    if get_origin(hint) is Literal:
        return [repr(choice) for choice in get_args(hint)]
    return [_phrase(hint, value)]


def _phrase(hint: Any, value: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _within_words(_words(inside[0]), inside[1:], value)
    if hint is None or hint is type(None):
        return "None"
    if isinstance(hint, type) and hasattr(hint, "array_type"):
        array = "an array" if "ndarray" in str(hint.array_type) else "a tensor"
        axes = hint.dim_str.replace("*", "").replace("_", " ").split()  # type: ignore[attr-defined]
        kind = _kind_of_array(hint)
        return f"{array} of {kind}s" + (f" [{', '.join(axes)}]" if axes and axes != ["..."] else "")
    if origin in _SEQUENCES:
        if origin is tuple and len(set(inside)) > 1 and ... not in inside:
            return f"a tuple ({', '.join(map(_words, inside))})"
        items = _PLURALS.get(inside[0], _words(inside[0])) if inside else "entries"
        if origin is tuple and ... not in inside:
            items = f"{len(inside)} {items}"
        return f"a sequence of {items}" if items else "a sequence"
    if origin in (Mapping, dict):
        return "a dict"
    if origin is Callable or hint is Callable:
        return "a function"
    if hint in _SINGULARS:
        return _SINGULARS[hint]
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return "a path"
    kind = getattr(hint, "__name__", str(hint))
    return f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"


def _within_words(kind: str, bounds: tuple[Any, ...], value: Any) -> str:
    ends: dict[str, Any] = {}
    for bound in bounds:  # annotated-types': Ge(ge=1), say
        ends |= asdict(bound)
    if ends == {"gt": 0}:
        return "a positive number"
    if {"gt", "lt"} == ends.keys():
        return f"a number between {ends['gt']} and {ends['lt']}"
    if ends.get("le") in (MOST, 2**63 - 1) and not (isinstance(value, int) and value > ends["le"]):
        del ends["le"]  # goes without saying
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return f"{kind} {' and '.join(f'{words[key]} {end}' for key, end in ends.items())}"


_SINGULARS = {
    str: "a string",
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
}
_PLURALS = {Any: "", str: "names", int: "integers", float: "finite numbers"}


def shown(value: Any) -> str:
    """A value as an error message says it: small ones whole, arrays by type and shape."""
    try:
        if hasattr(value, "dtype") and hasattr(value, "shape"):
            dtype = str(value.dtype).removeprefix("torch.")
            return f"{type(value).__name__} {dtype} {list(value.shape)}"
        plain = value is None or isinstance(
            value, str | bool | int | float | list | tuple | dict | os.PathLike
        )
        text = repr(value) if plain else ""
    except Exception:  # too deep, too long a number, or a tensor without a shape
        return _named(value)
    return text if plain and len(text) <= 60 else _named(value)


def _is_bools(hint: Any) -> bool:
    return hasattr(hint, "array_type") and _kind_of_array(hint) == "bool"


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"{value.__name__}"
    return f"{'an' if type(value).__name__[0] in 'AEIOUaeiou' else 'a'} {type(value).__name__}"


def _advice(name: str, hint: Any, value: Any) -> str:
    options = _options(hint)
    words = [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]
    if close := difflib.get_close_matches(shown(value).strip("'"), words, n=1):
        return f"did you mean {close[0]!r}?"
    takes_tensor = any("Tensor" in str(getattr(option, "array_type", option)) for option in options)
    name = name.rpartition(".")[2]
    if hasattr(value, "dtype") and "complex" in str(value.dtype):
        return f"take a real representation first, {name}.real or {name}.abs() say"
    if isinstance(value, Tensor) and any(_is_bools(option) for option in options):
        return f"where 1 stands for True, try {name}.bool()"
    if takes_tensor and hasattr(value, "series"):
        return f"try {name}.series"
    if takes_tensor and hasattr(value, "corrupted"):
        return "give a Pairs as two arguments, pairs.clean and pairs.corrupted"
    if takes_tensor and (hasattr(value, "__array__") or isinstance(value, list | tuple)):
        return f"try torch.as_tensor({name})"
    if name == "metric":
        return "such as patching.logit(target)"
    for option in options:
        if getattr(option, "__name__", "") in _ADVICE:
            return _ADVICE[option.__name__]
    if any(get_origin(option) in _SEQUENCES for option in options):
        if isinstance(value, str):
            return f"try {name}=({shown(value)},)"
        if isinstance(value, set | frozenset):
            return f"a set has no order, try sorted({name})"
    return ""
