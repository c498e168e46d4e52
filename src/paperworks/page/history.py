"""Runs as lists show them: what each was of, with which model, and the figure that sums it up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select

from paperworks.lab import records
from paperworks.lab.report import grid, table
from paperworks.lab.run import Measurement, Run
from paperworks.lab.store import MeasurementRow, RunRow, Store
from paperworks.lab.verdicts import headline, verdicts
from paperworks.page.concealing import for_visitors
from paperworks.page.tables import RunRequestRow
from paperworks.papers import load_cards

_FIELDS = tuple(Measurement.__dataclass_fields__)


@dataclass(frozen=True)
class Line:
    """A run in a list.

    Attributes:
        id: Its identity.
        paper: Slug of its paper.
        name: What its method is called.
        status: How it is.
        scale: Scale of its work; a tiny run is no measurement.
        when: When it was started.
        seconds: How long it took, None while it goes on.
        model: What it ran on: its parameter `model`, else `data`; empty where its recipe has neither.
        headline: The figure that a claim of the paper rests on, else the first that is taken to a baseline, else the first.
    """

    id: str
    paper: str
    name: str
    status: str
    scale: str
    when: datetime
    seconds: float | None
    model: str
    headline: Measurement | None


def name_of(slug: str) -> str:
    """What the methods of a paper are called; its slug where it has no card here."""
    card = load_cards().get(slug)
    return " and ".join(card.names) if card else slug


def runs_of(
    store: Store, *, paper: str | None = None, user_id: int | None = None, limit: int = 20, offset: int = 0
) -> list[Line]:
    """Runs, the last started first, as visitors see them.

    Args:
        store: The lab's store.
        paper: Only those of this paper.
        user_id: Only those that this person started from the page.
        limit: How many to return at most.
        offset: How many of the newest to leave out.
    """
    wanted: list[ColumnElement[bool]] = [] if paper is None else [RunRow.paper == paper]
    if user_id is not None:
        wanted.append(RunRow.id.in_(select(RunRequestRow.run_id).where(RunRequestRow.user_id == user_id)))
    return [_line(run) for run in _read(store, wanted, limit, offset)]


def counted(store: Store) -> dict[str, int]:
    """How many runs there are of each paper."""
    with store.reading() as session:
        return {
            slug: count for slug, count in session.execute(select(RunRow.paper, func.count()).group_by(RunRow.paper))
        }


def of_the_table(paper: str, measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements that make a recipe's table, in the order of its columns."""
    headings, rows = table(paper, measurements) if measurements else ([], [])
    places, series = {heading: place for place, heading in enumerate(headings)}, {row[0] for row in rows}
    found = [
        (heading, m) for m in measurements if (heading := grid([m])[0][1]) in places and (m.series or "") in series
    ]
    return [m for _, m in sorted(found, key=lambda pair: places[pair[0]])]


def _read(store: Store, wanted: Sequence[ColumnElement[bool]], limit: int, offset: int) -> list[Run]:
    """Runs with what they measured, without their logs and files, of which a list shows nothing."""
    columns = (RunRow.id, RunRow.paper, RunRow.parameters, RunRow.seed, RunRow.scale, RunRow.status)
    times = (RunRow.started, RunRow.finished, RunRow.environment, RunRow.error)
    query = select(*columns, *times).where(*wanted).order_by(RunRow.started.desc(), RunRow.id.desc())
    measured = select(MeasurementRow).order_by(MeasurementRow.id)
    figures: dict[str, list[Measurement]] = defaultdict(list)
    with store.reading() as session:
        rows = session.execute(query.limit(limit).offset(offset)).all()
        for kept in session.scalars(measured.where(MeasurementRow.run_id.in_([row.id for row in rows]))):
            figures[kept.run_id].append(Measurement(**{name: getattr(kept, name) for name in _FIELDS}))
    return [for_visitors(_run(row, figures[row.id])) for row in rows]


def _run(row: Any, measurements: list[Measurement]) -> Run:
    started = datetime.fromtimestamp(row.started, UTC)
    run = Run(row.paper, row.parameters, seed=row.seed, scale=row.scale, id=row.id, status=row.status, started=started)
    run.finished = None if row.finished is None else datetime.fromtimestamp(row.finished, UTC)
    run.environment, run.error, run.measurements = row.environment, row.error, measurements
    return run


def _line(run: Run) -> Line:
    model = next((str(run.parameters[name]) for name in ("model", "data") if run.parameters.get(name)), "")
    return Line(
        id=run.id, paper=run.paper, name=name_of(run.paper), status=run.status, scale=run.scale, when=run.started,
        seconds=None if run.finished is None else (run.finished - run.started).total_seconds(),
        model=model, headline=_headline(run),
    )  # fmt: skip


def _headline(run: Run) -> Measurement | None:
    card = load_cards().get(run.paper)
    found = verdicts(card, [records.as_record(run) | {"measurements": run.measurements}]) if card else []
    best = headline(found)
    if best is not None:
        return best.measurement
    shown = of_the_table(run.paper, run.measurements)
    return next((m for m in shown if m.against), next(iter(shown), None))
