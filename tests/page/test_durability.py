"""What was answered with success is there after the server was killed in the middle of its work."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from sqlalchemy import update

from paperworks.lab import Store
from paperworks.page.tables import EntryRow, RunRequestRow, SubscriptionRow, UserRow, VoteRow
from tests.page.serving import Reader, serving

WRITERS = 4


class Account:
    """What the server has answered with success."""

    def __init__(self) -> None:
        self.votes: set[tuple[str, str]] = set()
        self.subscriptions: set[str] = set()
        self.runs: set[str] = set()
        self._lock = threading.Lock()

    def keep(self, kind: set, what: object) -> None:
        with self._lock:
            kind.add(what)

    @property
    def writes(self) -> int:
        return len(self.votes) + len(self.subscriptions) + len(self.runs)


def write(url: str, number: int, slugs: list[str], account: Account, stop: threading.Event) -> None:
    """Vote, subscribe and start runs until the server is gone."""
    email = f"writer{number}@example.org"
    try:
        with Reader(base_url=url, timeout=30) as reader:
            assert (
                reader.send_form("/register", "/register", email=email, password="correct horse battery").status_code
                == 303
            )
            token = reader.token()
            for turn, slug in enumerate(slugs):
                if stop.is_set():
                    return
                answer = reader.post(f"/papers/{slug}/vote", data={"csrf": token})
                assert answer.status_code == 303, answer.text
                account.keep(account.votes, (email, slug))
                asked = f"reader{number}.{turn}@example.org"
                answer = reader.post("/subscribe", data={"csrf": token, "email": asked, "query": "draft"})
                assert answer.status_code == 200, answer.text
                account.keep(account.subscriptions, asked)
                if turn == 1 and number < 2:
                    answer = reader.post("/papers/hydra/runs", data={"csrf": token, "scale": "tiny"})
                    assert answer.status_code == 303, answer.text
                    account.keep(account.runs, answer.headers["location"].rpartition("/")[2])
    except httpx.TransportError:
        # What was under way when the server died was not answered.
        assert stop.is_set(), "the server died by itself"


def test_nothing_answered_with_success_is_lost_when_the_server_is_killed(store_url, monkeypatch):
    monkeypatch.delenv("PAPERWORKS_SMTP", raising=False)
    account, stop = Account(), threading.Event()
    generous = {"/": 1_000_000}
    with serving(store_url, processes=2, rates=generous) as server, Store(store_url) as store:
        with store.reading() as session:
            slugs = [slug for (slug,) in session.query(EntryRow.slug).filter(EntryRow.slug.is_not(None))]
        with ThreadPoolExecutor(WRITERS) as pool:
            writers = [pool.submit(write, server.url, n, slugs, account, stop) for n in range(WRITERS)]
            deadline = time.monotonic() + 90
            while account.writes < 80 or not account.runs:
                assert time.monotonic() < deadline and not any(w.done() and w.exception() for w in writers), [
                    writer.exception() for writer in writers if writer.done()
                ]
                time.sleep(0.01)
            stop.set()
            server.kill()
            for writer in writers:
                writer.result()
    with Store(store_url) as store:
        with store.reading() as session:
            votes = session.query(UserRow.email, EntryRow.slug).select_from(VoteRow)
            votes = votes.join(UserRow, UserRow.id == VoteRow.user_id).join(EntryRow, EntryRow.id == VoteRow.entry_id)
            kept = {tuple(row) for row in votes}
            subscribed = {email for (email,) in session.query(SubscriptionRow.email)}
            requested = {run_id for (run_id,) in session.query(RunRequestRow.run_id)}
        assert account.votes <= kept and account.subscriptions <= subscribed and account.runs <= requested
        assert account.votes and account.subscriptions
        for run_id in account.runs:
            # A run goes on without the server; where its process had not begun, the store says so.
            _wait_for_end(store, run_id)
            assert store.run(run_id).status in ("finished", "interrupted", "failed")
    # The next server finds a sound store.
    with serving(store_url) as server:
        _, slug = next(iter(account.votes))
        assert httpx.get(f"{server.url}/papers/{slug}.json").json()["votes"] >= 1
        assert httpx.get(f"{server.url}/runs/{next(iter(account.runs))}.json").status_code == 200


def _wait_for_end(store: Store, run_id: str) -> None:
    with store.writing() as session:
        session.execute(update(RunRequestRow).where(RunRequestRow.run_id == run_id).values(cancelled=True))
    deadline = time.monotonic() + 60
    while store.run(run_id).status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
