"""Votes: one a person and paper, kept once answered."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest

from paperworks.errors import UsageError
from paperworks.lab import Store
from paperworks.page import index as index_module
from paperworks.page.entries import Entry
from paperworks.page.index import Index
from paperworks.page.tables import UserRow
from paperworks.page.votes import unvote, vote, voted, votes_of

A, B = "2611.00001", "cs/0501001"


@pytest.fixture
def store(store_url, monkeypatch):
    monkeypatch.setattr(index_module, "chosen_embedder", lambda name=None: name)
    with Store(store_url) as opened:
        day = datetime(2026, 11, 1, tzinfo=UTC)
        Index(opened).add([Entry(key=key, title=f"Paper {key}", published=day) for key in (A, B)])
        with opened.writing() as session:
            session.add_all(UserRow(id=id, email=f"reader{id}@example.org", created=0.0) for id in range(1, 9))
        yield opened


def test_votes_are_counted_and_taken_back(store):
    assert [vote(store, 1, A), vote(store, 2, A), vote(store, 1, B)] == [1, 2, 1]
    assert votes_of(store, [A, B, "2611.99999"]) == {A: 2, B: 1, "2611.99999": 0}
    assert voted(store, 1, [A, B]) == {A, B} and voted(store, 2, [A, B]) == {A} and voted(store, 2, [B]) == set()
    assert unvote(store, 1, A) == 1
    assert votes_of(store, [A]) == {A: 1} and voted(store, 1, [A, B]) == {B}
    assert votes_of(store, []) == {} and voted(store, 1, []) == set()


def test_a_second_vote_of_the_same_person_changes_nothing(store):
    assert [vote(store, 1, A), vote(store, 1, A)] == [1, 1]
    assert [unvote(store, 1, A), unvote(store, 1, A)] == [0, 0]


def test_votes_at_the_same_time_all_count_once(store, store_url):
    answers: list[int] = []

    def clicks(user: int) -> None:
        with Store(store_url) as own:
            answers.extend(vote(own, user, A) for _ in range(3))

    readers = [threading.Thread(target=clicks, args=(user,)) for user in (1, 2, 3, 4, 1, 2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(answers) == 18 and max(answers) == 4
    assert votes_of(store, [A]) == {A: 4}


def test_a_vote_for_no_paper_or_by_nobody_is_refused(store):
    with pytest.raises(UsageError, match=r"holds no paper '2611.99999'; search for it"):
        vote(store, 1, "2611.99999")
    with pytest.raises(UsageError, match="holds no paper"):
        unvote(store, 1, "2611.99999")
    with pytest.raises(UsageError, match="no account 99; log in"):
        vote(store, 99, A)


def test_votes_go_with_the_account(store):
    vote(store, 1, A)
    with store.writing() as session:
        session.delete(session.get(UserRow, 1))
    assert votes_of(store, [A]) == {A: 0}


def test_a_vote_that_was_answered_survives_a_kill(store, store_url):
    code = (
        "import os, signal, sys; from paperworks.lab import Store; from paperworks.page.votes import vote; "
        "vote(Store(sys.argv[1]), 3, sys.argv[2]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, store_url, A]).returncode == -9
    assert voted(store, 3, [A]) == {A}
