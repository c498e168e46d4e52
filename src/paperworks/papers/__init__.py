"""The cards: one TOML file a paper, and the types that read them.

Cards of others stand beside them: those of installed plugins (entry point group `paperworks.recipes`), and those in the
folders that `PAPERWORKS_INCLUDE` names.

Example:
    >>> from paperworks.papers import get
    >>> get("hydra").imports
    ['from paperworks.decoding import Hydra']
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tomllib
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from paperworks.errors import UsageError

ROOMS: dict[str, str] = {
    "decoding": "generate faster",
    "attention": "read longer contexts",
    "sparsity": "keep fewer weights",
    "experts": "make and shrink mixtures of experts",
    "adapters": "fine-tune cheaply",
    "distillation": "learn from a teacher",
    "supervision": "learn from few or weak labels",
    "uncertainty": "know what is not known",
    "tuning": "choose hyper-parameters",
    "generative": "model and sample a distribution",
    "sequences": "time series and streams",
    "representation": "see what a network has learnt",
    "lab": "advise which method to use",
}
"""Every room, and what a user would do in it; `load_cards` adds the rooms of plugins."""

_OWN_ROOMS = tuple(ROOMS)
INCLUDE = "PAPERWORKS_INCLUDE"
"""The variable that names folders of cards and recipe modules, apart as those in PATH are."""
GROUP = "paperworks.recipes"

Text = Annotated[str, Field(min_length=1)]


class CardError(UsageError):
    """A card that cannot be read; the message names file and field."""


class PluginWarning(RuntimeWarning):
    """Something that a plugin or an included folder brings is left out; the message says what, and why."""


@dataclass(frozen=True)
class Source:
    """Who brings papers from outside this repository.

    Attributes:
        name: In words, "the plugin coin-flip (coin_flip.recipe)" or "the folder /home/me/papers".
        folder: Where its cards lie, with records and figures beside them.
        module: The package that its methods are imported from, empty where a folder is none.
        included: Whether `PAPERWORKS_INCLUDE` names it; else it is an installed plugin.
    """

    name: str
    folder: Path
    module: str = ""
    included: bool = False


class Evidence(BaseModel):
    """What here speaks to a claim: a measurement of the paper's record, or a test of this repository.

    Attributes:
        measurement: Name of the measurement.
        series: Its row.
        against: What it is taken to, where it is a ratio or difference.
        better: Which way the claim says that it goes.
        figure: The paper's figure in the measurement's unit, None where the paper says only which way.
        no_effect: What a plain figure with an interval would be without the effect claimed; of a ratio that is 1, of a
            difference 0.
        test: The test that shows it, `tests/room/test_paper.py::test_name`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    measurement: str = ""
    series: str = ""
    against: str = ""
    better: Literal["higher", "lower"] = "higher"
    figure: float | None = None
    no_effect: float | None = None
    test: str = Field(default="", pattern=r"^(tests/[\w/]+\.py::\w+)?$")

    @model_validator(mode="after")
    def _one_of_both(self) -> Evidence:
        if bool(self.measurement) == bool(self.test):
            raise ValueError("a claim is shown by a measurement or by a test: name one of them")
        if self.measurement and not self.against and self.figure is None and self.no_effect is None:
            raise ValueError(
                "a plain measurement says nothing by itself: give the figure that it should reach, or no_effect"
            )
        return self


class Claim(BaseModel):
    """One figure of a paper.

    Attributes:
        metric: What was measured.
        value: The figure, or words where the paper gives only a comparison.
        unit: Its unit, empty for none.
        setting: Model, data and conditions.
        against: What it was compared with, empty for nothing.
        source: Where the figure stands.
        shown_by: What here speaks to it, None where nothing does.
        differs: How the setting here differs from the paper's, where it does.
        needs: What it would take to show it, where nothing here does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Text
    value: float | Text
    unit: str = ""
    setting: Text
    against: str = ""
    source: Text
    shown_by: Evidence | None = None
    differs: str = ""
    needs: str = ""

    @model_validator(mode="after")
    def _shown_or_not(self) -> Claim:
        if self.shown_by is not None and self.needs:
            raise ValueError("what would show a claim (needs) is told only where nothing does (shown_by)")
        return self


class Paper(BaseModel):
    """A card.

    Attributes:
        number: Its place among the papers of this repository; 0 for a plugin's.
        slug: The name to type.
        title: The paper's title.
        arxiv: arXiv number, None where there is none or it is not known.
        year: Of first publication.
        authors: Where known.
        aim: What a user would do in a room of the plugin's own, in a line; empty for a room that there is already.
        room: The room of its method.
        names: Public names of the method in that room.
        module: What they are imported from; the room, or the plugin's package, by default.
        origin: Who brings it, empty for this repository.
        summary: Two sentences: what it does for the user, and how.
        tags: Lower-case words.
        code: Address of the authors' code.
        licence: Licence of that code, as an SPDX identifier.
        claims: Its figures.
        shortfall: Where figures measured here fall short of them: how far, why, and what it would take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(default=0, ge=0)
    slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: Text
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    year: int = Field(ge=1990, le=2100)
    authors: tuple[Text, ...] = ()
    aim: str = ""
    room: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    names: tuple[Text, ...] = Field(min_length=1)
    module: str = ""
    origin: str = ""
    summary: Text
    tags: tuple[Text, ...] = Field(min_length=1)
    code: str | None = Field(default=None, pattern=r"^https://")
    licence: str | None = None
    claims: tuple[Claim, ...] = ()
    shortfall: str = ""

    @field_validator("room")
    @classmethod
    def _known_room(cls, room: str, info: ValidationInfo) -> str:
        aim = info.data.get("aim")
        if room not in _OWN_ROOMS and not aim:
            raise ValueError(
                f"there is no room {room!r}, only {', '.join(_OWN_ROOMS)}; a room of a plugin's own comes with its aim in a line"
            )
        if room in _OWN_ROOMS and aim:
            raise ValueError(f"the room {room!r} has its aim already, {ROOMS[room]!r}: leave out yours")
        return room

    @property
    def url(self) -> str | None:
        """The paper's page on arXiv."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def imports(self) -> list[str]:
        """How to import the method; empty where a folder brings it, which is no package."""
        module = self.module or ("" if self.origin else f"paperworks.{self.room}")
        return [f"from {module} import {name}" for name in self.names if module]


def load_cards(folder: Path | None = None) -> dict[str, Paper]:
    """Every card by slug, in the order of their numbers: the package's own, then those of plugins and included folders.

    What a plugin or an included folder brings and cannot be read, or bears the slug of another card, is left out with a
    `PluginWarning`.

    Args:
        folder: Only the cards of this folder.

    Raises:
        CardError: A card of this repository, or of the folder, is not TOML, lacks a field or has a wrong one, or two cards
            share a slug or number.
    """
    return _read(folder) if folder is not None else _all_cards(os.environ.get(INCLUDE, ""))


def sources() -> list[Source]:
    """Who brings papers beside this repository: folders that `PAPERWORKS_INCLUDE` names, and installed plugins.

    Raises:
        UsageError: `PAPERWORKS_INCLUDE` names what is no folder.
    """
    found = []
    for given in filter(None, os.environ.get(INCLUDE, "").split(os.pathsep)):
        folder = Path(given).expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(f"there is no folder {given!r} to include: give one with TOML cards and recipe modules")
        package = folder.name if (folder / "__init__.py").is_file() else ""
        found.append(Source(f"the folder {given}", folder, package, included=True))
    for entry in entry_points(group=GROUP):
        folder_of_plugin = _folder(entry.module)
        if folder_of_plugin is not None:
            package = entry.module.partition(".")[0]
            found.append(Source(f"the plugin {entry.name} ({entry.module})", folder_of_plugin, package))
    return list(dict.fromkeys(found))


def rooms() -> dict[str, str]:
    """Every room, those of plugins too, and what a user would do in it."""
    load_cards()
    return ROOMS


def source_of(paper: Paper) -> Source | None:
    """Who brings a paper, None where this repository does."""
    return next((source for source in sources() if source.name == paper.origin), None)


def _folder(module: str) -> Path | None:
    """The folder of a plugin's module, found without running any of its code; None where it is no package or is missing."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))).joinpath(*inner)
    return folder if folder.is_dir() else folder.parent


@cache
def _all_cards(included: str) -> dict[str, Paper]:
    cards = _read(Path(__file__).parent)
    for slug, paper in cards.items():
        if not paper.number or paper.room not in _OWN_ROOMS:
            raise CardError(
                f"{slug}.toml: field 'number' or 'room': a card of this repository has a number and one of its rooms"
            )
    read: set[Path] = set()
    for source in sources():
        # Several entry points of one package share its cards.
        if source.folder in read:
            continue
        read.add(source.folder)
        for path in sorted(source.folder.glob("*.toml")):
            # An included folder may be a whole project.
            if path.name == "pyproject.toml":
                continue
            try:
                paper = _card(path)
            except CardError as error:
                warnings.warn(f"a card of {source.name} is left out: {error}", PluginWarning, stacklevel=2)
                continue
            if (other := cards.get(paper.slug)) is not None:
                warnings.warn(
                    f"the paper {paper.slug!r} of {source.name} is left out: {other.origin or 'Paperworks itself'} brings one of "
                    "that slug; rename one of them",
                    PluginWarning,
                    stacklevel=2,
                )
                continue
            brought = {"number": 0, "origin": source.name, "module": paper.module or source.module}
            cards[paper.slug] = paper.model_copy(update=brought)
            ROOMS.setdefault(paper.room, paper.aim)
    return cards


def _read(folder: Path) -> dict[str, Paper]:
    papers: list[Paper] = []
    for path in sorted(folder.glob("*.toml")):
        paper = _card(path)
        if paper.number and any(paper.number == other.number for other in papers):
            raise CardError(f"{path.name}: field 'number': another card has number {paper.number} already")
        papers.append(paper)
    return {paper.slug: paper for paper in sorted(papers, key=lambda paper: paper.number)}


def _card(path: Path) -> Paper:
    try:
        paper = Paper.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise CardError(f"{path.name} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise CardError(f"{path.name}: field {field!r}: {message}") from error
    if paper.slug != path.stem:
        raise CardError(f"{path.name}: field 'slug': it must be the file's name, {path.stem!r}, not {paper.slug!r}")
    return paper


def get(name: str) -> Paper:
    """The paper of this slug, public name, arXiv number or number.

    Raises:
        UsageError: There is none; the message names the nearest.
    """
    wanted = re.sub(r"v\d+$", "", name.strip().lower())
    cards = load_cards()
    for paper in cards.values():
        number = str(paper.number) if paper.number else None
        if wanted in (paper.slug, paper.arxiv, number, *(public.lower() for public in paper.names)):
            return paper
    near = difflib.get_close_matches(wanted, cards, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`paperworks list` shows them all"
    raise UsageError(f"there is no paper {name!r}: {hint}")
