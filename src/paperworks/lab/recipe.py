"""Recipes: functions that pit a method against its baseline, and how they are found and given options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from functools import cache, partial
from importlib.metadata import entry_points
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from paperworks.errors import UsageError
from paperworks.papers import GROUP, INCLUDE, ROOMS, PluginWarning, load_cards, sources

if TYPE_CHECKING:
    from paperworks.lab.run import Run

_EXPECTED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

# More do not fit beside one another in 80 characters.
MOST_COLUMNS = 6

_registry: dict[str, Recipe] = {}
_comparisons: dict[str, Recipe] = {}


@dataclass(frozen=True)
class Between:
    """Bounds of a number, both allowed, as in `Annotated[int, Between(1, 400)]`.

    The lower bound holds everywhere. The upper one holds for runs that others start from the web, which are to end
    within about the time of the default scale; a run on one's own machine may be as long as one likes.

    Raises:
        ValueError: They are no finite numbers, or the lower one is above the upper one.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"bounds are two finite numbers, the lower one first, not {self.low} and {self.high}")


@dataclass(frozen=True, init=False)
class _Named:
    """Marks a text that names something which the hub may have to fetch.

    On the web one chooses among what is there already; the command line takes any name, and paths.

    Args:
        *names: Which of the hub's names are offered, as patterns, all of them by default; and words of the recipe's
            own, which are always there.
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names or ("*",))


class Model(_Named):
    """Marks a text that names a model, as in `Annotated[str, Model("*", "first layer")]`."""


class Data(_Named):
    """Marks a text or a `Literal` that names data, as in `Annotated[str, Data("uci:*")]`."""


@dataclass(frozen=True)
class Parameter:
    """One option of a recipe.

    Args:
        name: Name of the keyword parameter.
        type: `int`, `float`, `bool`, `str`, a `Literal[...]` or an `Enum` class.
        default: Its value at the default scale.
        help: What it means, from the `Args` section of the recipe's docstring.
        bounds: Of a number.
        names: What a text names, where it is a model or data.

    Example:
        >>> Parameter("new_tokens", int, 128).parse("64")
        64
        >>> Parameter("law", Literal["greedy", "typical"], "greedy").choices
        ('greedy', 'typical')
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    bounds: Between | None = None
    names: Model | Data | None = None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values to choose from, empty where any value of the type will do."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)
        if isinstance(self.type, type) and issubclass(self.type, Enum):
            return tuple(self.type)
        return ()

    def parse(self, value: object) -> Any:
        """Turn a value, or its spelling on a command line or in a form, into one of this type.

        Args:
            value: A value of the type, or text that spells one. An `Enum` member is spelt by its value.

        Raises:
            UsageError: The value is not one of this type, or below its lower bound.

        Example:
            >>> Parameter("temperature", float, 1.0).parse("warm")
            Traceback (most recent call last):
            ...
            paperworks.errors.UsageError: temperature takes a finite number, not 'warm'
            >>> Parameter("epochs", int, 3, bounds=Between(1, 12)).parse("0")
            Traceback (most recent call last):
            ...
            paperworks.errors.UsageError: epochs takes a whole number of at least 1, not '0'
        """
        if self.choices:
            by_spelling = {str(_plain(choice)): choice for choice in self.choices}
            spelling = str(_plain(value))
            if spelling in by_spelling:
                return by_spelling[spelling]
            expected, near = f"one of {', '.join(by_spelling)}", _did_you_mean(spelling, by_spelling)
        else:
            expected, near = _EXPECTED[self.type], ""
            if self.bounds is not None:
                expected += f" of at least {self.bounds.low}"
            try:
                converted = _CONVERT[self.type](value)
                if self.bounds is None or converted >= self.bounds.low:
                    return converted
            except ValueError:
                pass
        raise UsageError(f"{self.name} takes {expected}, not {value!r}{near}")


def _whole_number(value: object) -> int:
    if isinstance(value, str) or (isinstance(value, Integral) and not isinstance(value, bool)):
        return int(value)
    raise ValueError


def _number(value: object) -> float:
    if isinstance(value, str) or (isinstance(value, Real) and not isinstance(value, bool)):
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError


def _truth(value: object) -> bool:
    spelling = str(value).strip().lower()
    if spelling not in _TRUE + _FALSE:
        raise ValueError
    return spelling in _TRUE


def _text(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, str):
        return value
    raise ValueError


_CONVERT: dict[type, Callable[[object], Any]] = {int: _whole_number, float: _number, bool: _truth, str: _text}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _did_you_mean(given: str, known: Iterable[str]) -> str:
    near = get_close_matches(given, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


@dataclass(frozen=True)
class Recipe:
    """A function that measures a paper's method, with what the command line and the page need to offer it.

    Made by the decorator `recipe`. Call it with a run to carry it out in this process;
    `paperworks.lab.execute` does that and keeps the run in the store.

    Args:
        paper: Slug of the paper.
        name: Name of the function.
        summary: First line of its docstring.
        baseline: What the method is compared with, in words.
        parameters: The options, by name, without `seed`.
        scales: For each scale the options that differ from the default one.
        function: The function itself.
        seeded: Whether the function takes the run's seed as `seed`.
        columns: The measurements that make its table, by name, or as "name against X" where several share a name.
        rows: Patterns of the series that make its rows; all of them where there is none.
        gpu: How much a GPU changes what it measures, for the order when a GPU is at hand for a few minutes; 0 for nothing.
        shared: For each keyword argument that is a dataclass, its class; the class's fields are among `parameters`.
    """

    paper: str
    name: str
    summary: str
    baseline: str
    parameters: dict[str, Parameter]
    scales: dict[str, dict[str, Any]]
    function: Callable[..., None]
    seeded: bool = False
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    gpu: int = 0
    shared: dict[str, type[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.function.__doc__)

    def parse(self, options: Mapping[str, object]) -> dict[str, Any]:
        """Turn options, as text or as values, into typed keyword arguments.

        Args:
            options: Values by name; a name may be written with hyphens, as on the command line.

        Returns:
            The same options, typed; those not given are left out.

        Raises:
            UsageError: A name is unknown or a value is not of its type.

        Example:
            >>> from paperworks.lab import Run
            >>> def hydra(run: Run, new_tokens: int = 128, greedy: bool = True) -> None: ...
            >>> _describe(hydra, paper="hydra").parse({"new-tokens": "64", "greedy": "no"})
            {'new_tokens': 64, 'greedy': False}
        """
        parsed = {}
        for given, value in options.items():
            name = given.replace("-", "_")
            if name not in self.parameters:
                raise UsageError(
                    f"{self.paper} has no option {given}{_did_you_mean(name, self.parameters) or ';'}"
                    f" it takes {', '.join(self.parameters) or 'none'}"
                )
            try:
                parsed[name] = self.parameters[name].parse(value)
            except UsageError as error:
                raise UsageError(f"{self.paper}: {error}") from None
        return parsed

    def resolve(self, options: Mapping[str, object] | None = None, scale: str = "default") -> dict[str, Any]:
        """Give every parameter its value: the default, then what the scale says, then the options given.

        Args:
            options: As for `parse`.
            scale: One of `scales`.

        Raises:
            UsageError: The scale or an option is unknown, or a value is not of its type.

        Example:
            >>> from paperworks.lab import Run
            >>> def hydra(run: Run, new_tokens: int = 128, repeats: int = 5) -> None: ...
            >>> described = _describe(hydra, paper="hydra", tiny={"new_tokens": 8, "repeats": 1})
            >>> described.resolve({"repeats": 2}, "tiny")
            {'new_tokens': 8, 'repeats': 2}
        """
        if scale not in self.scales:
            raise UsageError(f"{self.paper} has no scale {scale!r}; choose one of {', '.join(self.scales)}")
        defaults = {name: parameter.default for name, parameter in self.parameters.items()}
        return defaults | self.scales[scale] | self.parse(options or {})

    def plain(self, options: Mapping[str, object] | None = None, scale: str = "default") -> dict[str, Any]:
        """Resolve the options to values that JSON holds: `Enum` members become their values."""
        return {name: _plain(value) for name, value in self.resolve(options, scale).items()}

    def __call__(self, run: Run, **options: object) -> None:
        """Carry out the recipe in this process and let it record into the run.

        Args:
            run: The run to record into; its seed is handed to a function that takes `seed`.
            **options: As for `parse`; the others keep their defaults.
        """
        values = self.resolve(options)
        together = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in self.shared.items()
        }
        seed = {"seed": run.seed} if self.seeded else {}
        self.function(run, **values, **together, **seed)


def recipe(
    paper: str,
    *,
    baseline: str = "",
    tiny: Mapping[str, object] | None = None,
    large: Mapping[str, object] | None = None,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    gpu: int = 0,
) -> Callable[[Callable[..., None]], Recipe]:
    """Make a function the recipe of a paper.

    The function takes a `Run` and keyword parameters, each with a type among `int`, `float`, `bool`, `str`,
    `Literal` and `Enum` and with a default, which is its value at the default scale. `Annotated` gives bounds to a
    number (`Between`) and says that a text names a `Model` or `Data`. A parameter `seed` is
    filled with the run's seed. What several recipes share is one frozen dataclass with such fields: each field becomes
    an option, with its help from the class's docstring and its default from the instance that is the argument's
    default. Heavy libraries are imported inside the function, so that listing stays quick.

    Args:
        paper: Slug of the paper.
        baseline: What the method is compared with, in words.
        tiny: Parameters that differ at scale `tiny`, which takes seconds.
        large: Parameters that differ at scale `paper`, meant for a GPU.
        columns: The measurements that make the table which people read, at most six, by name, or as "name against X"
            where one name has several baselines. All else that was recorded is in `paperworks results ID --all`.
        rows: The series that make its rows, as patterns such as "Hydra*"; all that have one of the columns by default.
        gpu: How much a GPU changes what it measures: `paperworks bench --minutes` goes by it, and leaves out a 0.

    Raises:
        TypeError: A parameter has no default or a type that cannot become an option, or two have one name.
        ValueError: A scale names no parameter, there are too many columns, or another function is the recipe of this paper already.

    Example:
        >>> from paperworks.lab import Run
        >>> @recipe(paper="dice", tiny={"throws": 6})
        ... def dice(run: Run, throws: int = 600) -> None:
        ...     '''Mean of a die.
        ...
        ...     Args:
        ...         throws: How often it is thrown.
        ...     '''
        >>> dice.summary, dice.parameters["throws"].help, list(dice.scales)
        ('Mean of a die.', 'How often it is thrown.', ['tiny', 'default'])

        >>> @dataclass(frozen=True)
        ... class Throwing:
        ...     '''How dice are thrown.
        ...
        ...     Args:
        ...         throws: How often.
        ...         sides: Of each die.
        ...     '''
        ...     throws: int = 600
        ...     sides: int = 6
        >>> @recipe(paper="backgammon")
        ... def backgammon(run: Run, work: Throwing = Throwing(throws=100), doubles: bool = True) -> None:
        ...     run.record("outcomes", work.sides**2, better="higher")
        >>> {name: parameter.default for name, parameter in backgammon.parameters.items()}
        {'throws': 100, 'sides': 6, 'doubles': True}
    """

    def register(function: Callable[..., None]) -> Recipe:
        made = _describe(function, paper, baseline, tiny, large, columns, rows, gpu)
        before = _registry.get(paper)
        if before is not None and _where(before.function) != _where(function):
            raise ValueError(
                f"{paper} has the recipe {_where(before.function)} already; give {_where(function)} another paper"
            )
        _registry[paper] = made
        return made

    return register


def comparison(
    room: str,
    *,
    baseline: str = "",
    tiny: Mapping[str, object] | None = None,
    large: Mapping[str, object] | None = None,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Recipe]:
    """Make a function the comparison of a room: its methods and what one would otherwise take, on the same work.

    It stands in `paperworks.recipes.<room>.comparison`, and is run by `paperworks compare --room ROOM`. All else is as for
    `recipe`, with the room's name in the place of a paper's slug.
    """

    def register(function: Callable[..., None]) -> Recipe:
        _comparisons[room] = made = _describe(function, room, baseline, tiny, large, columns, rows)
        return made

    return register


def comparisons() -> dict[str, Recipe]:
    """The comparison of each room that has one, by the room's name."""
    for room in ROOMS:
        name = f"paperworks.recipes.{room}"
        if (
            room not in _comparisons
            and importlib.util.find_spec(name)
            and importlib.util.find_spec(f"{name}.comparison")
        ):
            importlib.import_module(f"{name}.comparison")
    return dict(_comparisons)


def _where(function: Callable[..., None]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _describe(
    function: Callable[..., None],
    paper: str,
    baseline: str = "",
    tiny: Mapping[str, object] | None = None,
    large: Mapping[str, object] | None = None,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    gpu: int = 0,
) -> Recipe:
    if len(columns) > MOST_COLUMNS:
        raise ValueError(f"recipe {paper}: a table has at most {MOST_COLUMNS} columns, given {len(columns)}")
    doc = inspect.getdoc(function) or ""
    _, *arguments = inspect.signature(function).parameters.values()
    types = get_type_hints(function, include_extras=True)
    parameters: dict[str, Parameter] = {}
    shared: dict[str, type[Any]] = {}
    for argument in arguments:
        if argument.name == "seed":
            continue
        kind = types.get(argument.name)
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(argument.default, kind):
            shared[argument.name] = kind
            options, helps = _fields(argument.default), _argument_helps(inspect.getdoc(kind) or "")
        else:
            options, helps = {argument.name: (kind, argument.default)}, _argument_helps(doc)
        for name, (annotation, default) in options.items():
            option_type, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
            bounds = next((mark for mark in marks if isinstance(mark, Between)), None)
            names = next((mark for mark in marks if isinstance(mark, Model | Data)), None)
            parameter = Parameter(name, option_type, default, helps.get(name, ""), bounds, names)
            if name in parameters or (name == "seed" and argument.name in shared):
                raise TypeError(f"recipe {paper}: two parameters are named {name}; rename one")
            if default is argument.empty or not (parameter.choices or option_type in _CONVERT):
                raise TypeError(
                    f"recipe {paper}: parameter {name} needs a default and a type among "
                    "int, float, bool, str, Literal, Enum and a dataclass of such"
                )
            if (bounds and option_type not in (int, float)) or (names and option_type in (int, float, bool)):
                raise TypeError(f"recipe {paper}: numbers have bounds, and texts name models or data, unlike {name}")
            if bounds and default > bounds.high:
                raise TypeError(f"recipe {paper}: the default of {name} is above its own bound {bounds.high}")
            parameter.parse(default)
            parameters[name] = parameter
    described = Recipe(
        paper=paper,
        name=function.__name__,
        summary=doc.partition("\n")[0],
        baseline=baseline,
        parameters=parameters,
        scales={},
        function=function,
        seeded="seed" in types,
        columns=tuple(columns),
        rows=tuple(rows),
        gpu=gpu,
        shared=shared,
    )
    for scale, values in (("tiny", tiny), ("default", {}), ("paper", large)):
        if values is not None:
            described.scales[scale] = described.parse(values)
    return described


def _fields(values: Any) -> dict[str, tuple[Any, Any]]:
    """Type and value of each field of a dataclass's instance."""
    types = get_type_hints(type(values), include_extras=True)
    return {field.name: (types[field.name], getattr(values, field.name)) for field in fields(values)}


def _argument_helps(doc: str) -> dict[str, str]:
    helps: dict[str, str] = {}
    name = ""
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+)(?: \([^)]*\))?: *(.*)", line):
            name, helps[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            helps[name] += f" {line.strip()}"
    return helps


def recipes() -> dict[str, Recipe]:
    """All recipes by the slug of their paper: those shipped here, those of installed plugins, and those of included folders.

    A package adds its own through the entry point group `paperworks.recipes`, each entry naming a recipe or a
    module that defines some, with their cards beside that module. A folder that `PAPERWORKS_INCLUDE` names holds cards,
    and for each a module of its name. What cannot be imported, or has no card, is left out with a `PluginWarning`.

    Example:
        >>> all(slug == recipe.paper for slug, recipe in recipes().items())
        True
    """
    _discover(os.environ.get(INCLUDE, ""))
    return dict(sorted(_registry.items()))


@cache
def _discover(included: str) -> None:
    package = importlib.import_module("paperworks.recipes")
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None)
    papers = load_cards()
    for module in found:
        # A recipe's module is named for its paper; what recipes share lies beside them, and may be heavy to import.
        if module.name.rpartition(".")[2].replace("_", "-") in papers:
            _load(f"the recipe in {module.name}", partial(importlib.import_module, module.name))
    for source in (one for one in sources() if one.included):
        for card in papers.values():
            path = source.folder / f"{card.slug.replace('-', '_')}.py"
            if card.origin == source.name and path.is_file():
                _load(f"the recipe {path.name} of {source.name}", partial(_import_file, path, source.module))
    for entry in entry_points(group=GROUP):
        before = set(_registry)
        what = f"the recipe plugin {entry.name} ({entry.value})"
        _load(what, entry.load)
        for slug in set(_registry) - before - set(papers):
            del _registry[slug]
            warnings.warn(
                f"{what} is left out: its paper {slug!r} has no card, or one that cannot be taken; {slug}.toml beside the "
                "module, in its package, is one",
                PluginWarning,
                stacklevel=2,
            )


def _import_file(path: Path, package: str) -> None:
    # What lies beside it may be imported when it runs.
    folder = str(path.parent.parent if package else path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    if package:
        importlib.import_module(f"{package}.{path.stem}")
        return
    # By a name of its own, as a file random.py is not to stand in for Python's.
    name = f"paperworks_included_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _load(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except Exception as error:
        told = " ".join(str(error).split())
        warnings.warn(f"{what} could not be loaded: {type(error).__name__}: {told}", PluginWarning, stacklevel=2)


def find(paper: str) -> Recipe:
    """The recipe of a paper.

    Args:
        paper: Slug of the paper, or whatever else `paperworks.papers.get` knows it by.

    Raises:
        UsageError: There is no such paper, or it has no recipe yet.
    """
    known = recipes()
    if paper in known:
        return known[paper]
    from paperworks import papers

    slug = papers.get(paper).slug
    if slug not in known:
        raise UsageError(f"{slug} is planned: it has no recipe yet; `paperworks list` shows what runs")
    return known[slug]
