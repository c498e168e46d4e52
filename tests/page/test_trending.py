"""Trending, against the formula computed paper by paper."""

from __future__ import annotations

import math
import random
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.lab.store import RunRow
from paperworks.page import index as index_module
from paperworks.page.entries import Entry
from paperworks.page.index import Index
from paperworks.page.tables import EntryRow, UserRow, VoteRow
from paperworks.page.trending import FORMULA, PERIODS, _added_up, _fresh, trending
from paperworks.papers import load_cards

DAY = 86400.0
SLUGS = list(load_cards())[:6]


@pytest.fixture
def store(store_url, monkeypatch):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    with Store(store_url) as opened:
        Index(opened)
        yield opened


def paper(number: int, age: float, **told) -> Entry:
    """A paper published so many days ago."""
    published = datetime.fromtimestamp(time.time() - age * DAY, UTC)
    return Entry(key=f"2611.{number:05d}", title=f"Paper {number}", published=published, **told)


def fill(store: Store, entries: list[Entry], votes: dict[int, list[float]], runs: dict[str, list[float]]) -> None:
    """Papers, votes for them by their place and runs by their slug, by age in days."""
    Index(store).add(entries)
    now = time.time()
    most = max(map(len, votes.values()), default=0)
    with store.writing() as session:
        ids = {row.key: row.id for row in session.query(EntryRow)}
        session.add_all(UserRow(id=user + 1, email=f"{user}@example.org", created=0.0) for user in range(most))
        session.flush()
        for place, ages in votes.items():
            session.add_all(
                VoteRow(user_id=user + 1, entry_id=ids[entries[place].key], at=now - age * DAY)
                for user, age in enumerate(ages)
            )
        for slug, ages in runs.items():
            session.add_all(run(slug, f"{slug} {number}", now - age * DAY) for number, age in enumerate(ages))


def run(slug: str, id: str, finished: float, status: str = "finished", scale: str = "default") -> RunRow:
    return RunRow(
        id=id, paper=slug, parameters={}, seed=0, scale=scale, status=status, started=finished - 10, finished=finished,
        environment={}, progress=[], host="here", pid=1, process_started=0.0, heartbeat=finished,
    )  # fmt: skip


@pytest.mark.parametrize("period", PERIODS)
def test_scores_are_those_of_the_formula(store, period):
    random.seed(len(period))
    length = PERIODS[period]
    entries = [
        paper(number, random.uniform(0, 3 * length), upvotes=random.choice([0, 0, 3, 40]),
              slug=SLUGS[number] if number < len(SLUGS) else None)
        for number in range(40)
    ]  # fmt: skip
    votes = {place: _ages(8, length) for place in range(0, 40, 2)}
    runs = {slug: _ages(5, length) for slug in SLUGS}
    fill(store, entries, votes, runs)

    def score(place: int) -> float:
        V = sum(_weight(age, length) for age in votes.get(place, []))
        R = sum(_weight(age, length) for age in runs.get(entries[place].slug, []))
        age = (time.time() - entries[place].published.timestamp()) / DAY
        return V + math.log2(1 + R) + (1 + math.log2(1 + entries[place].upvotes)) * _weight(age, length)

    expected = sorted(range(40), key=lambda place: (-score(place), -entries[place].published.timestamp()))
    found = trending(store, period, limit=40)
    assert [trend.entry.key for trend in found] == [entries[place].key for place in expected]
    assert [trend.score for trend in found] == pytest.approx([score(place) for place in expected], rel=1e-3)
    for name, counted in (("votes", votes.get), ("runs", lambda place: runs.get(entries[place].slug))):
        recent = [sum(age < length for age in counted(place) or ()) for place in expected]
        assert [getattr(trend, name) for trend in found] == recent
    # Pages of the list are the list, though each looks at fewer papers.
    assert [trend for offset in range(0, 40, 7) for trend in _keys(trending(store, period, 7, offset))] == _keys(found)


def _ages(most: int, length: float) -> list[float]:
    return [random.uniform(0, 2 * length) for _ in range(random.randint(0, most))]


def _weight(age: float, length: float) -> float:
    return 2 ** (-2 * age / length) if age < length else 0


def _keys(trends) -> list[str]:
    return [trend.entry.key for trend in trends]


def test_votes_bring_an_old_paper_before_a_new_one_until_they_are_old(store):
    entries = [paper(0, 400), paper(1, 0.5), paper(2, 100)]
    fill(store, entries, {0: [0.1, 0.2, 0.3], 2: [9.0] * 5}, {})
    assert [trend.entry.title for trend in trending(store, "week")] == ["Paper 0", "Paper 1", "Paper 2"]
    assert [trend.entry.title for trend in trending(store, "month")] == ["Paper 2", "Paper 0", "Paper 1"]


def test_a_day_a_week_and_a_month_are_1_7_and_30_days(store):
    fill(store, [paper(0, 400)], {0: [0.99, 1.01, 6.99, 7.01, 29.99, 30.01]}, {})
    assert [trending(store, period)[0].votes for period in ("day", "week", "month")] == [1, 3, 5]
    assert trending(store)[0].votes == 3


def test_what_a_clock_ahead_of_ours_tells_counts_as_fresh_and_no_more(store):
    fill(store, [paper(0, 50), paper(1, -0.1)], {0: [-0.1, -0.2]}, {})
    assert [(trend.score, trend.votes) for trend in trending(store, "day")] == [(2.0, 2), (1.0, 0)]


def test_what_counts_halves_with_each_half_of_the_period_and_ends_with_it():
    ages = np.array([-3.0, 0.0, 0.5, 5.0, 7.5, 9.99, 10.0, 11.0])
    expected = [1.0, 1.0, 2**-0.1, 0.5, 2**-1.5, 2**-1.998, 0.0, 0.0]
    assert _fresh(ages, 10.0).tolist() == pytest.approx(expected, rel=1e-12)


def test_votes_of_papers_that_came_while_the_others_were_read_are_nobodys():
    votes = [(5.0, 100.0), (7.0, 100.0), (9.0, 95.0), (1.0, 100.0), (12.0, 100.0), (5.0, 90.5)]
    session = SimpleNamespace(execute=lambda query: SimpleNamespace(all=lambda: votes))
    weights, counts = _added_up(session, None, np.array([2.0, 5.0, 9.0]), 100.0, 10.0)
    assert weights.tolist() == pytest.approx([0.0, 1 + 2**-1.9, 0.5]) and counts.tolist() == [0, 2, 1]


def test_only_finished_runs_count(store):
    entries = [paper(0, 50, slug=SLUGS[0]), paper(1, 50.1, slug=SLUGS[1])]
    fill(store, entries, {}, {})
    with store.writing() as session:
        for number, status in enumerate(["failed", "running", "interrupted"]):
            session.add(run(SLUGS[0], f"{number}", time.time(), status))
        session.add(run(SLUGS[1], "finished", time.time()))
    first, second = trending(store, "week")
    assert (first.entry.slug, first.runs, second.runs) == (SLUGS[1], 1, 0)
    assert first.score == pytest.approx(1, abs=1e-3)


def test_without_votes_and_runs_the_newest_come_first(store):
    fill(store, [paper(number, 10.0 * ((7 * number) % 11 + 1)) for number in range(11)], {}, {})
    by_age = sorted(range(11), key=lambda number: (7 * number) % 11)
    assert [trend.entry.title for trend in trending(store, "day", 11)] == [f"Paper {number}" for number in by_age]
    assert trending(store, "day", 1, 10)[0].score == 0


def test_of_equals_what_runs_here_comes_first(store):
    statuses = ["planned", "measured", None, "runs", "measured", "planned"]
    entries = [
        paper(number, 100.0 + number, slug=SLUGS[number], status=status) for number, status in enumerate(statuses)
    ]
    fill(store, [*entries, paper(6, 0.1)], {}, {})
    expected = [6, 1, 3, 4, 0, 2, 5]
    assert [trend.entry.title for trend in trending(store, "day", 7)] == [f"Paper {number}" for number in expected]
    assert [trending(store, "day", 1, place)[0].entry.title for place in range(7)] == [
        f"Paper {number}" for number in expected
    ]


def test_an_empty_index_has_no_trends(store):
    assert trending(store) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"period": "year"}, "no period 'year', only day, week, month"),
        ({"limit": 0}, "limit is at least 1"),
        ({"offset": -1}, "offset at least 0"),
    ],
)
def test_what_is_out_of_range_is_refused(store, wrong, message):
    with pytest.raises(UsageError, match=message):
        trending(store, **wrong)


def test_the_formula_on_the_page_says_what_counts():
    for word in ("V + log₂(1 + R) + (1 + log₂(1 + U)) · N", "day, week or month", "2^(−2 · age / period)"):
        assert word in FORMULA


def test_a_tiny_run_measures_nothing_and_does_not_count(store):
    entries = [paper(number, 40, slug=slug) for number, slug in enumerate(SLUGS[:2])]
    fill(store, entries, {}, {SLUGS[0]: [0.1]})
    with store.writing() as session:
        session.add_all(run(SLUGS[1], f"tiny {number}", time.time() - 60, scale="tiny") for number in range(9))
    first, second = trending(store, "week", 2)
    assert (first.entry.slug, first.runs, second.entry.slug, second.runs) == (SLUGS[0], 1, SLUGS[1], 0)
    assert second.score == 0
