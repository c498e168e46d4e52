"""A badge that tells how many of a paper's claims hold here, for the README of its authors."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from paperworks.lab.verdicts import Verdict, in_words

# Widths of Verdana at 11 pixels, rounded up, so that no word touches an edge where another font stands in.
_CHARACTER, _MARGIN, _HEIGHT = 6.6, 10, 20
_LEFT = "Paperworks"


def badge(found: Sequence[Verdict]) -> str:
    """The badge as SVG. Its words say all; the colour only repeats whether most claims hold.

    Example:
        >>> badge([])[:4]
        '<svg'
    """
    told = in_words(found)
    share = sum(verdict.holds for verdict in found) / len(found) if found else 0.0
    colour = "#1a6e4a" if share > 0.5 else "#5f5a20" if share > 0 else "#555555"
    left, right = (round(len(text) * _CHARACTER) + 2 * _MARGIN for text in (_LEFT, told))
    label = escape(f"{_LEFT}: {told}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{_HEIGHT}" role="img" aria-label="{label}">'
        f"<title>{label}</title>"
        f'<rect width="{left}" height="{_HEIGHT}" fill="#333333"/>'
        f'<rect x="{left}" width="{right}" height="{_HEIGHT}" fill="{colour}"/>'
        f'<g fill="#ffffff" font-family="Verdana, DejaVu Sans, sans-serif" font-size="11">'
        f'<text x="{_MARGIN}" y="14">{_LEFT}</text><text x="{left + _MARGIN}" y="14">{escape(told)}</text></g></svg>'
    )
