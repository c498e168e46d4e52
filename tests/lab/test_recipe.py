from __future__ import annotations

import importlib
import re
import sys
import warnings
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Literal

import pytest

from paperworks.errors import UsageError
from paperworks.lab import Run
from paperworks.lab.recipe import Between, Data, Model, find, recipe, recipes

module = importlib.import_module("paperworks.lab.recipe")


class Law(Enum):
    GREEDY = "greedy"
    TYPICAL = "typical"


@pytest.fixture
def everything(registry):
    @recipe(paper="everything", baseline="nothing", tiny={"steps": "2", "law": "typical"}, large={"steps": 900})
    def everything(
        run: Run,
        steps: int = 100,
        rate: float = 0.5,
        greedy: bool = True,
        model: str = "smollm2-135m",
        way: Literal["up", "down"] = "up",
        size: Literal[1, 2, 4] = 1,
        law: Law = Law.GREEDY,
        seed: int = 0,
    ) -> None:
        """Everything a recipe can take.

        It has a second paragraph.

        Args:
            run: Where it records.
            steps: How many steps,
                counted from one.
            rate (float): Learning rate.
            law: Which law.

        Raises:
            ValueError: steps: never.
        """
        run.record("steps", steps, better="lower", series=f"{law} {seed}")

    return everything


def test_parameters_come_from_the_signature_and_help_from_the_docstring(everything):
    assert everything.paper == "everything" and everything.name == "everything"
    assert everything.summary == "Everything a recipe can take."
    assert everything.__doc__ == everything.function.__doc__ != type(everything).__doc__
    assert list(everything.parameters) == ["steps", "rate", "greedy", "model", "way", "size", "law"]
    assert everything.parameters["steps"].help == "How many steps, counted from one."
    assert everything.parameters["rate"].help == "Learning rate."
    assert everything.parameters["model"].help == ""
    assert everything.parameters["size"].choices == (1, 2, 4)
    assert everything.parameters["law"].choices == (Law.GREEDY, Law.TYPICAL)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "64", 64),
        ("steps", 64, 64),
        ("rate", "1e-3", 0.001),
        ("rate", 1, 1.0),
        ("greedy", "no", False),
        ("greedy", "True", True),
        ("greedy", False, False),
        ("model", Path("/models/llama"), "/models/llama"),
        ("way", "down", "down"),
        ("size", "4", 4),
        ("size", 2, 2),
        ("law", "typical", Law.TYPICAL),
        ("law", Law.TYPICAL, Law.TYPICAL),
    ],
)
def test_options_are_typed(everything, name, text, value):
    parsed = everything.parse({name: text})
    assert parsed == {name: value} and type(parsed[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "everything: steps takes a whole number, not 'many'"),
        ("steps", 1.5, "everything: steps takes a whole number, not 1.5"),
        ("steps", True, "everything: steps takes a whole number, not True"),
        ("rate", "nan", "everything: rate takes a finite number, not 'nan'"),
        ("rate", None, "everything: rate takes a finite number, not None"),
        ("greedy", "perhaps", "everything: greedy takes true or false, not 'perhaps'"),
        ("model", 3, "everything: model takes text, not 3"),
        ("way", "dawn", "everything: way takes one of up, down, not 'dawn'; did you mean down?"),
        ("size", 3, "everything: size takes one of 1, 2, 4, not 3"),
        (
            "law",
            "typicl",
            "everything: law takes one of greedy, typical, not 'typicl'; did you mean typical?",
        ),
    ],
)
def test_a_bad_value_is_refused_with_the_cure(everything, name, text, message):
    with pytest.raises(UsageError) as refused:
        everything.parse({name: text})
    assert str(refused.value) == message


def test_an_unknown_option_is_refused_with_close_matches(everything):
    with pytest.raises(UsageError, match=r"everything has no option step; did you mean steps.*it takes steps, rate"):
        everything.parse({"step": 1})
    with pytest.raises(UsageError, match="everything has no option zzz; it takes steps, rate"):
        everything.parse({"zzz": 1})


def test_scales_override_defaults_and_options_override_scales(everything):
    assert list(everything.scales) == ["tiny", "default", "paper"]
    assert everything.resolve()["steps"] == 100
    assert everything.resolve(scale="tiny")["steps"] == 2
    assert everything.resolve(scale="paper")["steps"] == 900
    assert everything.resolve({"steps": 5}, "tiny")["steps"] == 5
    assert everything.resolve(scale="tiny")["law"] is Law.TYPICAL
    assert everything.plain(scale="tiny")["law"] == "typical"
    with pytest.raises(UsageError, match="no scale 'huge'; choose one of tiny, default, paper"):
        everything.resolve(scale="huge")


def test_a_recipe_without_a_scale_does_not_pretend_to_have_it(registry):
    @recipe(paper="coin")
    def coin(run: Run) -> None: ...

    with pytest.raises(UsageError, match="no scale 'tiny'; choose one of default"):
        coin.resolve(scale="tiny")


def test_calling_a_recipe_resolves_options_and_hands_over_the_seed(everything):
    run = Run("everything", seed=7)
    everything(run, steps="3", law="typical")
    assert run.measurements[0].value == 3
    assert run.measurements[0].series == "Law.TYPICAL 7"


def test_unsound_recipes_are_refused_when_they_are_defined(registry):
    with pytest.raises(TypeError, match="parameter steps needs a default and a type"):

        @recipe(paper="coin")
        def no_default(run: Run, steps: int) -> None: ...

    with pytest.raises(TypeError, match="parameter steps needs a default and a type"):

        @recipe(paper="coin")
        def no_type(run: Run, steps=3) -> None: ...

    with pytest.raises(TypeError, match="parameter steps"):

        @recipe(paper="coin")
        def odd_type(run: Run, steps: list[int] = []) -> None: ...  # noqa: B006

    with pytest.raises(ValueError, match="steps takes a whole number"):

        @recipe(paper="coin")
        def odd_default(run: Run, steps: int = "3.5") -> None: ...

    with pytest.raises(ValueError, match="no option step"):

        @recipe(paper="coin", tiny={"step": 1})
        def odd_scale(run: Run, steps: int = 3) -> None: ...

    assert not registry


@dataclass(frozen=True)
class Shared:
    """What two recipes share.

    Args:
        model: Name of
            the model.
        steps: Of training.
    """

    model: str = "small"
    steps: int = 10


def test_shared_parameters_become_options_with_their_help_and_defaults(registry):
    seen = []

    @recipe(paper="first", tiny={"steps": 1})
    def first(run: Run, work: Shared = Shared(steps=5), extra: bool = False, seed: int = 0) -> None:
        """One."""
        seen.append((work, extra, seed))

    assert {name: p.default for name, p in first.parameters.items()} == {"model": "small", "steps": 5, "extra": False}
    assert first.parameters["model"].help == "Name of the model."
    assert first.plain({"extra": "yes"}, "tiny") == {"model": "small", "steps": 1, "extra": True}
    first(Run("first", seed=3), **{"steps": "7", "model": "large"})
    assert seen == [(Shared("large", 7), False, 3)]
    with pytest.raises(UsageError, match="first has no option work"):
        first.parse({"work": "x"})


@dataclass(frozen=True)
class Throwing:
    """How dice are thrown."""

    throws: Annotated[int, Between(1, 40)] = 10


def test_annotations_give_bounds_and_say_what_a_text_names(registry):
    @recipe(paper="dice", tiny={"throws": 2}, large={"throws": 90})
    def dice(
        run: Run,
        work: Throwing = Throwing(),
        weight: Annotated[float, Between(0.5, 2)] = 1.0,
        model: Annotated[str, Model("*", "none")] = "none",
        data: Annotated[Literal["auto", "digits"], Data()] = "auto",
    ) -> None:
        """Throw dice."""

    told = {name: (p.type, p.bounds, p.names) for name, p in dice.parameters.items()}
    assert told == {
        "throws": (int, Between(1, 40), None),
        "weight": (float, Between(0.5, 2), None),
        "model": (str, None, Model("*", "none")),
        "data": (Literal["auto", "digits"], None, Data("*")),
    }
    assert dice.parameters["data"].choices == ("auto", "digits")
    # Upper bounds are for runs from the web.
    assert dice.resolve({"throws": 41}, "paper")["throws"] == 41
    for options, message in (
        ({"throws": 0}, "dice: throws takes a whole number of at least 1, not 0"),
        ({"throws": "-3"}, "throws takes a whole number of at least 1, not '-3'"),
        ({"weight": 0.4}, "weight takes a finite number of at least 0.5, not 0.4"),
    ):
        with pytest.raises(UsageError, match=message):
            dice.resolve(options)


@pytest.mark.parametrize(
    ("annotation", "default", "message"),
    [
        (Annotated[str, Between(1, 2)], "1", "numbers have bounds, and texts name models or data, unlike x"),
        (Annotated[bool, Between(0, 1)], True, "numbers have bounds"),
        (Annotated[int, Model()], 1, "texts name models or data, unlike x"),
        (Annotated[int, Between(1, 2)], 3, "the default of x is above its own bound 2"),
    ],
)
def test_annotations_that_do_not_fit_are_refused_when_a_recipe_is_defined(registry, annotation, default, message):
    def dice(run: Run, x: annotation = default) -> None: ...

    dice.__annotations__["x"] = annotation
    with pytest.raises(TypeError, match=message):
        recipe(paper="dice")(dice)


def test_a_default_or_a_scale_below_its_bound_is_refused(registry):
    def dice(run: Run, x: Annotated[int, Between(2, 4)] = 3) -> None: ...

    with pytest.raises(UsageError, match="x takes a whole number of at least 2, not 1"):
        recipe(paper="dice", tiny={"x": 1})(dice)


@pytest.mark.parametrize("bounds", [(2, 1), (0, float("inf")), (float("nan"), 1)])
def test_bounds_are_two_finite_numbers_in_order(bounds):
    with pytest.raises(ValueError, match="bounds are two finite numbers, the lower one first"):
        Between(*bounds)


def test_shared_parameters_that_clash_are_refused(registry):
    with pytest.raises(TypeError, match="two parameters are named steps"):

        @recipe(paper="clash")
        def clash(run: Run, work: Shared = Shared(), steps: int = 2) -> None:
            """Two of one name."""

    with pytest.raises(TypeError, match="work needs a default"):

        @recipe(paper="bare")
        def bare(run: Run, work: Shared) -> None:
            """No default."""


def test_two_recipes_for_one_paper_are_refused(registry):
    @recipe(paper="coin")
    def first(run: Run) -> None: ...

    with pytest.raises(ValueError, match=r"coin has the recipe .*first already"):

        @recipe(paper="coin")
        def second(run: Run) -> None: ...

    assert registry["coin"] is first


def test_recipes_are_found_by_slug(everything):
    assert find("everything") is everything
    assert recipes() == {"everything": everything}


def test_an_unknown_paper_is_refused(registry):
    with pytest.raises(UsageError):
        find("no-such-paper-anywhere")


def test_a_paper_without_a_recipe_is_planned(registry):
    with pytest.raises(UsageError, match="hydra is planned: it has no recipe yet"):
        find("hydra")


def test_modules_are_found_in_their_rooms_and_a_broken_one_is_a_warning(registry, tmp_path, monkeypatch):
    import paperworks.recipes as package

    room = tmp_path / "playroom"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "marble.py").write_text(
        "from paperworks.lab import Run, recipe\n"
        "@recipe(paper='marble')\n"
        "def marble(run: Run, size: int = 1) -> None:\n"
        "    '''Marbles.'''\n"
    )
    (room / "shards.py").write_text("raise OSError('broken on purpose')\n")
    (room / "shelf.py").write_text("raise OSError('what recipes share is not imported to find them')\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(module, "load_cards", lambda: {"marble": None, "shards": None})
    module._discover.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"playroom\.shards could not be loaded: OSError: broken on purpose"):
        found = recipes()
    assert found["marble"].summary == "Marbles."
    for name in [name for name in sys.modules if ".recipes.playroom" in name]:
        del sys.modules[name]


def test_every_recipe_lies_in_a_module_named_for_its_paper():
    import paperworks.recipes as package

    for path in Path(package.__path__[0]).rglob("*.py"):
        for paper in re.findall(r'^@recipe\(\s*(?:paper=)?"([^"]+)"', path.read_text(), flags=re.MULTILINE):
            assert path.stem == paper.replace("-", "_")


def test_plugins_are_found_by_entry_point_and_a_broken_one_is_a_warning(registry, tmp_path, monkeypatch):
    (tmp_path / "paperworks_plugin_for_test.py").write_text(
        "from paperworks.lab import Run, recipe\n@recipe(paper='kite')\ndef kite(run: Run) -> None:\n    '''Kites.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        EntryPoint("torn", "paperworks_plugin_that_is_not_there", "paperworks.recipes"),
        EntryPoint("kite", "paperworks_plugin_for_test:kite", "paperworks.recipes"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: entries if group == "paperworks.recipes" else [])
    monkeypatch.setattr(module, "load_cards", lambda: {"kite": None})
    module._discover.cache_clear()
    with pytest.warns(RuntimeWarning, match="the recipe plugin torn .* could not be loaded: ModuleNotFoundError"):
        assert "kite" in recipes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find("kite").summary == "Kites."


def test_listing_recipes_imports_nothing_heavy():
    import subprocess

    code = (
        "import sys; from paperworks.lab.recipe import recipes; import paperworks.lab; recipes();"
        "heavy = {'torch', 'numpy', 'matplotlib', 'ray', 'sqlalchemy', 'alembic', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
