"""The cards: one TOML file a paper, and the types that read them.

Example:
    >>> from paperworks.papers import get
    >>> get("hydra").imports
    ['from paperworks.decoding import Hydra']
"""

from __future__ import annotations

import difflib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
"""Every room, and what a user would do in it."""

Text = Annotated[str, Field(min_length=1)]


class CardError(UsageError):
    """A card that cannot be read; the message names file and field."""


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
        number: Its place among the papers.
        slug: The name to type.
        title: The paper's title.
        arxiv: arXiv number, None where there is none or it is not known.
        year: Of first publication.
        authors: Where known.
        room: The room of its method.
        names: Public names of the method in that room.
        summary: Two sentences: what it does for the user, and how.
        tags: Lower-case words.
        code: Address of the authors' code.
        licence: Licence of that code, as an SPDX identifier.
        claims: Its figures.
        shortfall: Where figures measured here fall short of them: how far, why, and what it would take.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int = Field(ge=1)
    slug: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: Text
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    year: int = Field(ge=1990, le=2100)
    authors: tuple[Text, ...] = ()
    room: str
    names: tuple[Text, ...] = Field(min_length=1)
    summary: Text
    tags: tuple[Text, ...] = Field(min_length=1)
    code: str | None = Field(default=None, pattern=r"^https://")
    licence: str | None = None
    claims: tuple[Claim, ...] = ()
    shortfall: str = ""

    @field_validator("room")
    @classmethod
    def _known_room(cls, room: str) -> str:
        if room not in ROOMS:
            raise ValueError(f"there is no room {room!r}, only {', '.join(ROOMS)}")
        return room

    @property
    def url(self) -> str | None:
        """The paper's page on arXiv."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def imports(self) -> list[str]:
        """How to import the method."""
        return [f"from paperworks.{self.room} import {name}" for name in self.names]


def load_cards(folder: Path | None = None) -> dict[str, Paper]:
    """Every card of a folder by slug, in the order of their numbers; the package's own cards by default.

    Raises:
        CardError: A card is not TOML, lacks a field or has a wrong one, or two cards share a slug or number.
    """
    return _own_cards() if folder is None else _read(folder)


@cache
def _own_cards() -> dict[str, Paper]:
    return _read(Path(__file__).parent)


def _read(folder: Path) -> dict[str, Paper]:
    papers: list[Paper] = []
    for path in sorted(folder.glob("*.toml")):
        try:
            paper = Paper.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise CardError(f"{path.name} is not valid TOML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise CardError(f"{path.name}: field {field!r}: {message}") from error
        if paper.slug != path.stem:
            raise CardError(f"{path.name}: field 'slug': it must be the file's name, {path.stem!r}, not {paper.slug!r}")
        if any(paper.number == other.number for other in papers):
            raise CardError(f"{path.name}: field 'number': another card has number {paper.number} already")
        papers.append(paper)
    return {paper.slug: paper for paper in sorted(papers, key=lambda paper: paper.number)}


def get(name: str) -> Paper:
    """The paper of this slug, public name, arXiv number or number.

    Raises:
        UsageError: There is none; the message names the nearest.
    """
    wanted = re.sub(r"v\d+$", "", name.strip().lower())
    cards = load_cards()
    for paper in cards.values():
        if wanted in (paper.slug, paper.arxiv, str(paper.number), *(public.lower() for public in paper.names)):
            return paper
    near = difflib.get_close_matches(wanted, cards, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`paperworks list` shows them all"
    raise UsageError(f"there is no paper {name!r}: {hint}")
