"""Badges: their words fit, their colour follows what holds."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import ImageFont

from paperworks.lab.verdicts import Verdict, in_words
from paperworks.page import badge as module
from paperworks.page.badge import badge
from paperworks.papers import get

SVG = "{http://www.w3.org/2000/svg}"
GREEN, YELLOW, GREY = "#1a6e4a", "#5f5a20", "#555555"


def found(holding: int, others: int, kind: str = "unclear") -> list[Verdict]:
    claim = get("hydra").claims[0]
    return [Verdict(claim, each, "") for each in ["reproduced"] * holding + [kind] * others]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("holding", "others", "colour"),
    [(0, 0, GREY), (0, 3, GREY), (1, 9, YELLOW), (1, 1, YELLOW), (5, 4, GREEN), (1, 0, GREEN), (3, 0, GREEN)],
)
def test_a_badge_is_green_where_most_claims_hold_and_grey_where_none_does(holding, others, colour):
    image = ElementTree.fromstring(badge(found(holding, others)))
    assert [part.get("fill") for part in image.iter(f"{SVG}rect")] == ["#333333", colour]


@pytest.mark.parametrize("verdicts", [[], found(1, 1), found(2, 10, "direction"), found(0, 4, "contradicted")])
def test_the_words_of_a_badge_fit_into_it(verdicts):
    """Measured in DejaVu Sans, the second of its fonts."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
    image = ElementTree.fromstring(badge(verdicts))
    boxes, texts = list(image.iter(f"{SVG}rect")), list(image.iter(f"{SVG}text"))
    assert [text.text for text in texts] == ["Paperworks", in_words(verdicts)]
    end = 0
    for box, text in zip(boxes, texts, strict=True):
        assert float(box.get("x", 0)) == end and box.get("height") == image.get("height") == "20"
        room = float(text.get("x")) - end, end + float(box.get("width")) - float(text.get("x"))
        assert room[0] == 10 and 7 < room[1] - font.getlength(text.text) < 10 + 0.25 * font.getlength(text.text)
        end += float(box.get("width"))
    assert end == float(image.get("width"))


def test_what_a_badge_says_ends_no_attribute_and_no_element(monkeypatch):
    told = "\"><script>alert(1)</script>&'"
    monkeypatch.setattr(module, "in_words", lambda verdicts: told)
    image = ElementTree.fromstring(badge([]))
    assert image.get("aria-label") == image.findtext(f"{SVG}title") == f"Paperworks: {told}"
    assert [text.text for text in image.iter(f"{SVG}text")][1] == told and image.find(f".//{SVG}script") is None
