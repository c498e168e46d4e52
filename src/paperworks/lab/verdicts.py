"""What the committed records say of the papers' claims. A verdict is computed from them, never typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from paperworks.lab.records import device, figure, interval, records_of, status
from paperworks.lab.run import Measurement
from paperworks.papers import Claim, Evidence, Paper, load_cards

Kind = Literal["reproduced", "direction", "unclear", "contradicted", "proved", "not shown here"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TINY = "scale tiny shows that it works; it says nothing of the claims"
_HOLD = ("reproduced", "proved")


@dataclass(frozen=True)
class Verdict:
    """What was measured here of one claim.

    Attributes:
        claim: The claim.
        kind: The verdict in a word or two, one of `KINDS`.
        why: The reason in a few words.
        measurement: The figure that it rests on, None where there is none.
        device: What that was measured on, "cpu" or "cuda"; empty without a measurement.
    """

    claim: Claim
    kind: Kind
    why: str
    measurement: Measurement | None = None
    device: str = ""

    @property
    def holds(self) -> bool:
        """Whether the claim holds here: its figure was reached, or a test shows it."""
        return self.kind in _HOLD

    @property
    def paper_says(self) -> str:
        """The paper's figure with its unit and what it is taken to."""
        unit = f" {self.claim.unit}" if self.claim.unit else ""
        return f"{figure(self.claim.value)}{unit}{f' against {self.claim.against}' if self.claim.against else ''}"

    @property
    def ours(self) -> str:
        """Our figure with its interval and what it is; the test that shows it; empty where there is neither."""
        if self.measurement is None:
            return self.claim.shown_by.test.partition("::")[2].replace("_", " ") if self.claim.shown_by else ""
        m = self.measurement
        told = f"{interval(m)} {m.name}{f', {m.series}' if m.series else ''}"
        return f"{told} against {m.against}" if m.against else told

    def as_json(self) -> dict[str, Any]:
        """Claim, verdict and figure as JSON values."""
        return {
            **self.claim.model_dump(exclude_none=True),
            "verdict": self.kind,
            "why": self.why,
            "measured": None
            if self.measurement is None
            else {**self.measurement.__dict__, "device": self.device, "pairs": len(self.measurement.repeats)},
        }


def verdicts(paper: Paper, records: Sequence[Mapping[str, Any]] | None = None) -> list[Verdict]:
    """The verdict on each claim of a paper, in the card's order.

    Args:
        paper: The card.
        records: The records to rest on; the paper's committed ones by default. One of scale tiny says nothing. Where
            several hold the figure, the first that has an interval for it is taken; a GPU's, on which most papers
            measure, comes first.

    Example:
        >>> claim = Claim(
        ...     metric="speed-up", value=2.0, unit="x", setting="GPU", source="abstract",
        ...     shown_by=Evidence(measurement="speed-up", series="Hydra", against="plain", figure=2.0),
        ... )
        >>> paper = Paper(number=1, slug="hydra", title="Hydra", year=2024, room="decoding", names=["Hydra"],
        ...     summary="Drafts.", tags=["llm"], claims=[claim])
        >>> measured = Measurement("speed-up", 1.5, "x", series="Hydra", low=1.3, high=1.7, against="plain")
        >>> [found] = verdicts(paper, [{"environment": {}, "measurements": [measured]}])
        >>> found.kind, found.why
        ('direction', 'clear of 1, short of 2')
    """
    taken = records_of(paper.slug) if records is None else records
    telling = [record for record in taken if record.get("scale") != "tiny"]
    return [_verdict(claim, telling, paper.origin or "this repository") for claim in paper.claims]


def _verdict(claim: Claim, records: Sequence[Mapping[str, Any]], tested_by: str) -> Verdict:
    evidence = claim.shown_by
    if evidence is None:
        return Verdict(claim, "not shown here", claim.needs)
    if evidence.test:
        return Verdict(claim, "proved", f"a test of {tested_by} shows it")
    found = [(m, device(record)) for record in records if (m := find(evidence, record["measurements"]))]
    if not found:
        return Verdict(claim, "not shown here", "no record holds this measurement")
    measurement, where = next(((m, on) for m, on in found if m.low is not None), found[0])
    return Verdict(claim, *judge(measurement, evidence), measurement, where)


def find(evidence: Evidence, measurements: Iterable[Measurement]) -> Measurement | None:
    """The measurement that an evidence names, None where there is none.

    Raises:
        ValueError: Several measurements go by that name.
    """
    named = [
        m
        for m in measurements
        if (m.name, m.series or "", m.against or "") == (evidence.measurement, evidence.series, evidence.against)
    ]
    if len(named) > 1:
        raise ValueError(f"{len(named)} measurements are named {evidence.measurement!r}, {evidence.series!r}")
    return named[0] if named else None


def judge(measurement: Measurement, evidence: Evidence) -> tuple[Kind, str]:
    """The verdict that a figure gives, and why.

    The figure of a ratio or difference counts only where its interval is clear of no effect. A plain figure without an
    interval, such as a count or the error of a closed form, is reached or not.

    Example:
        >>> judge(Measurement("ratio", 1.2, "x", low=0.9, high=1.6, against="b"), Evidence(measurement="ratio", against="b"))
        ('unclear', 'the interval holds 1')
    """
    sign = 1 if evidence.better == "higher" else -1
    none = measurement.no_effect if evidence.no_effect is None else evidence.no_effect
    reached = evidence.figure is None or sign * measurement.value >= sign * evidence.figure
    short = "" if evidence.figure is None else f"short of {figure(evidence.figure)}"
    if none is None:
        return ("reproduced", f"reaches {figure(evidence.figure or 0)}") if reached else ("unclear", short)
    if measurement.low is None or measurement.high is None:
        return "unclear", "it has no interval"
    low, high = sorted((sign * measurement.low, sign * measurement.high))
    if high < sign * none:
        return "contradicted", f"the interval lies on the other side of {figure(none)}"
    if low <= sign * none:
        return "unclear", f"the interval holds {figure(none)}"
    clear = f"clear of {figure(none)}"
    if not reached:
        return "direction", f"{clear}, {short}"
    return "reproduced", clear if evidence.figure is None else f"{clear}, reaches {figure(evidence.figure)}"


def tally(found: Sequence[Verdict]) -> dict[Kind, int]:
    """How many claims have each verdict, those that none has left out."""
    counts = Counter(verdict.kind for verdict in found)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def in_words(found: Sequence[Verdict]) -> str:
    """How many of the claims hold: "2 of 4 claims hold, 1 in direction".

    Example:
        >>> in_words([])
        'no claims'
    """
    if not found:
        return "no claims"
    counts = tally(found)
    told = f"{sum(verdict.holds for verdict in found)} of {len(found)} claims hold"
    others = [f"{counts[kind]} {said}" for kind, said in _SAID.items() if kind in counts]
    return ", ".join([told, *others])


_SAID: dict[Kind, str] = {"direction": "in direction", "contradicted": "contradicted"}


def headline(found: Iterable[Verdict]) -> Verdict | None:
    """The verdict on the first claim that a figure here speaks to: what a list has room for."""
    return next((verdict for verdict in found if verdict.measurement is not None), None)


def verdicts_by_paper(room: str | None = None, kind: str | None = None) -> dict[str, list[Verdict]]:
    """By slug the verdicts on the papers that run here: all, or only those of a room or of one kind; papers with none are left out."""
    found = {
        paper.slug: [verdict for verdict in verdicts(paper) if kind in (None, verdict.kind)]
        for paper in load_cards().values()
        if room in (None, paper.room) and status(paper) != "planned"
    }
    return {slug: some for slug, some in found.items() if some}
