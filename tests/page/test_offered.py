"""What a run from the page may be told: within bounds, with models and data that are here, and nothing else."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import pytest

from paperworks.errors import UsageError
from paperworks.lab.recipe import Data, Model, find, recipe, recipes
from paperworks.page import offered as module
from paperworks.page.offered import checked, offered

WORK = [(slug, name) for slug, one in recipes().items() for name in one.parameters]


@pytest.mark.parametrize(("slug", "name"), WORK)
def test_every_number_of_every_recipe_has_bounds_of_the_default_scales_order(slug, name):
    parameter = find(slug).parameters[name]
    if parameter.type not in (int, float):
        return
    assert parameter.bounds is not None, f"{slug}: give {name} bounds, Annotated[..., Between(low, high)]"
    assert parameter.bounds.low <= parameter.default <= parameter.bounds.high
    if parameter.type is int:
        # Hydra's 0 stands for what pays on the machine: there other recipes' number is taken.
        usual = find("chimera").parameters["nodes"].default if (slug, name) == ("hydra", "nodes") else parameter.default
        assert parameter.bounds.high <= 4 * usual


@pytest.mark.parametrize("slug", recipes())
def test_every_recipe_is_offered_at_its_tiny_and_its_default_scale_and_at_no_gpus(slug):
    offer = offered(find(slug))
    assert offer.scales == ("tiny", "default")
    assert checked(find(slug), {}, "default") == find(slug).plain()
    with pytest.raises(UsageError, match=f"{slug} at scale paper is more than a run from the page may take"):
        checked(find(slug), {}, "paper")


@pytest.mark.parametrize(("slug", "name"), WORK)
def test_every_parameter_is_a_number_within_bounds_or_a_choice(slug, name):
    one = find(slug)
    [field] = [field for field in offered(one).fields if field.name == name]
    if field.high is not None:
        assert checked(one, {name: field.high}, "tiny")[name] == field.high
        above = one.parameters[name].type(field.high + 1)
        with pytest.raises(
            UsageError, match=f"{name} is at most .* in a run from the page, not {above}; the command line takes"
        ):
            checked(one, {name: str(above)}, "tiny")
        # On a machine of one's own there is no upper bound.
        assert one.resolve({name: above}, "tiny")[name] == above
        return
    assert field.choices and field.default in field.choices
    for choice in field.choices:
        assert checked(one, {name: str(choice)}, "tiny")[name] == choice


NAMES = (
    "evil/model",
    "HuggingFaceTB/SmolLM2-1.7B",
    "/etc/passwd",
    "~/model",
    "../../secret",
    "https://example.org/x",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_readers_own_reaches_the_hub(name):
    for slug, parameter in (("hydra", "model"), ("recursive-speculation", "draft"), ("superposed-decoding", "corpus")):
        with pytest.raises(UsageError, match=f"{parameter} is one of .* in a run from the page, not '{name}'"):
            checked(find(slug), {parameter: name}, "tiny")
        assert find(slug).resolve({parameter: name}, "tiny")[parameter] == name


def test_a_file_of_the_server_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gguf").touch()
    with pytest.raises(UsageError, match="model is one of"):
        checked(find("hydra"), {"model": "mine.gguf"}, "tiny")


@pytest.fixture
def here(monkeypatch):
    """Which models and data there are."""
    names = {True: {"small": True, "large": False}, False: {"uci:yacht": True, "uci:year": False, "digits": True}}
    monkeypatch.setattr(module, "_here", names.__getitem__)


class Kind(Enum):
    FAST = "fast"
    SLOW = "slow"


def test_models_and_data_are_chosen_from_what_is_here(registry, here):
    @recipe(paper="hydra", tiny={"model": "small"}, large={"model": "large"})
    def made(
        run,
        model: Annotated[str, Model()] = "small",
        draft: Annotated[str, Model("*", "first layer")] = "large",
        table: Annotated[str, Data("uci:*")] = "uci:year",
        images: Annotated[Literal["auto", "digits", "uci:year"], Data()] = "auto",
        kind: Kind = Kind.FAST,
        note: str = "a,b",
        twice: bool = False,
    ) -> None:
        """Make."""

    offer = offered(made)
    assert {field.name: field.choices for field in offer.fields} == {
        "model": ("small",),
        # The default is the recipe's own word.
        "draft": ("large", "first layer", "small"),
        "table": ("uci:year", "uci:yacht"),
        "images": ("auto", "digits"),
        "kind": ("fast", "slow"),
        # What nobody has said to be a model or data may name one all the same.
        "note": ("a,b",),
        "twice": (True, False),
    }
    assert offer.scales == ("tiny", "default")
    with pytest.raises(UsageError, match="note is one of a,b in a run from the page, not 'a,b,c'"):
        checked(made, {"note": "a,b,c"}, "tiny")


def test_a_number_without_bounds_is_at_most_what_its_scales_give_it(registry):
    @recipe(paper="hydra", tiny={"epochs": 9, "rate": 0.5}, large={"width": 10**6})
    def made(run, epochs: int = 3, width: int = 64, rate: float = 0.1) -> None:
        """Make."""

    assert {field.name: (field.low, field.high) for field in offered(made).fields} == {
        "epochs": (0, 9), "width": (0, 64), "rate": (0, 0.5),
    }  # fmt: skip
    assert offered(made).scales == ("tiny", "default")
    for options in ({"width": 65}, {"epochs": "10"}, {"rate": 0.51}, {"width": "9" * 30}, {"epochs": -1}):
        with pytest.raises(UsageError, match="in a run from the page"):
            checked(made, options, "default")
    with pytest.raises(UsageError, match="at scale paper is more than a run from the page may take"):
        checked(made, {}, "paper")


def test_a_hub_that_is_set_up_badly_offers_the_recipes_own_words(monkeypatch, caplog):
    monkeypatch.setenv("PAPERWORKS_DATA", "/no/such/folder")
    assert "text" in {field.name for field in offered(find("conditional-beam-search")).fields}
    [field] = [field for field in offered(find("conditional-beam-search")).fields if field.name == "text"]
    assert field.choices[0] == "wikitext-2"
    # The operator is told.
    assert "/no/such/folder" in caplog.text
