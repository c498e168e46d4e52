from __future__ import annotations

import multiprocessing
import platform
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError

from paperworks.errors import UsageError
from paperworks.lab import Run, Store
from paperworks.lab import store as module
from paperworks.lab.run import Bar, Bars, Environment, Log, Measurement
from paperworks.lab.store import SCHEMA, Base, RunRow
from paperworks.page import tables  # noqa: F401 (the page's tables are among those compared)


@pytest.fixture
def store(store_url, tmp_path):
    with Store(store_url, artefacts=tmp_path / "artefacts") as opened:
        yield opened


def begun(store: Store, paper: str = "hydra", **options) -> Run:
    run = Run(paper, recorder=store, artefacts=store.artefacts, **options)
    store.begin(run)
    return run


def ended(store: Store, run: Run, status: str = "finished") -> Run:
    run.status = status
    store.end(run)
    return run


def test_a_run_comes_back_as_it_was(store):
    run = begun(store, parameters={"new_tokens": 64, "model": "smollm2-135m", "greedy": True}, seed=5, scale="tiny")
    run.keep(Environment({"python": "3.11", "packages": {"torch": "2.13"}}))
    run.record("perplexity", 12.5, unit="bits", better="lower", series="Hydra")
    run.keep(Measurement("speed-up", 1.5, "x", "higher", "Hydra", 1.4, 1.6, [1.4, 1.6], "plain"))
    run.log("a message with ünïcode and\na second line")
    (run.artefact_folder / "notes.txt").write_text("kept")
    run.keep_files()
    run.error, run.traceback = "ValueError: no", "Traceback ..."
    ended(store, run, "failed")
    back = store.run(run.id)
    for name in ("id", "paper", "parameters", "seed", "scale", "status", "environment", "error", "traceback"):
        assert getattr(back, name) == getattr(run, name), name
    assert back.measurements == run.measurements
    assert back.logs == run.logs
    assert back.artefacts == run.artefacts and back.artefacts["notes.txt"].read_text() == "kept"
    assert back.started == run.started
    assert back.finished is not None and back.finished >= back.started


def test_a_record_is_there_for_others_at_once(store, store_url):
    run = begun(store)
    with Store(store_url) as other:
        assert other.run(run.id).status == "running"
        run.record("tokens", 1, better="higher")
        assert [m.value for m in other.run(run.id).measurements] == [1]
        store.add(run.id, Bars((Bar(1, "training", 3, 4),)))
        assert other.run(run.id).bars == (Bar(1, "training", 3, 4),)
        ended(store, run)
        assert other.run(run.id).bars == ()


def test_runs_are_listed_newest_first_and_chosen_by_paper_and_status(store):
    first = ended(store, begun(store, "hydra"))
    second = ended(store, begun(store, "chimera"), "failed")
    third = ended(store, begun(store, "hydra"), "failed")
    fourth = begun(store, "hydra")
    assert [run.id for run in store.runs()] == [run.id for run in (fourth, third, second, first)]
    assert [run.id for run in store.runs("hydra")] == [fourth.id, third.id, first.id]
    assert [run.id for run in store.runs(status="failed")] == [third.id, second.id]
    assert [run.id for run in store.runs("hydra", "running")] == [fourth.id]
    assert [run.id for run in store.runs(limit=2)] == [fourth.id, third.id]
    assert store.runs("no-such-paper") == []


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_a_run_that_is_over_does_not_begin_again(store, status):
    run = begun(store)
    run.record("tokens", 1, better="higher")
    ended(store, run, status)
    again = Run("hydra", id=run.id, parameters={"new_tokens": 7}, recorder=store)
    with pytest.raises(UsageError, match=f"run {run.id} is {status} already, and a run takes place once"):
        store.begin(again)
    back = store.run(run.id)
    assert (back.status, back.parameters, [m.value for m in back.measurements]) == (status, {}, [1])


def test_an_announced_run_begins_once(store):
    announced = begun(store)
    taken_over = Run("hydra", id=announced.id)
    store.begin(taken_over)
    taken_over.environment = {"python": "3.11"}
    store.begin(taken_over)
    with pytest.raises(UsageError, match="is under way already"):
        store.begin(taken_over)
    assert store.run(announced.id).environment == {"python": "3.11"}


def test_of_many_that_begin_a_run_at_once_one_does(store_url):
    with Store(store_url) as store:
        run_id = begun(store).id
    ready, outcomes = threading.Barrier(4), []

    def begin() -> None:
        run = Run("hydra", id=run_id)
        run.environment = {"python": "3.11"}
        with Store(store_url) as own:
            ready.wait()
            try:
                own.begin(run)
            except UsageError:
                outcomes.append("refused")
            else:
                outcomes.append("begun")

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["begun", "refused", "refused", "refused"]


@pytest.fixture
def absent(request, store_url, monkeypatch):
    """A store that takes nothing from the time it is called until a run has waited so many times, and those waits."""
    monkeypatch.setattr(module, "_BUSY", 0.05)
    request.getfixturevalue("store")
    server, _, database = store_url.rpartition("/")
    engine = create_engine(
        store_url if store_url.startswith("sqlite") else f"{server}/postgres", isolation_level="AUTOCOMMIT"
    )
    connection = engine.connect()
    waits: list[float] = []

    def leave(waiting: int) -> list[float]:
        if engine.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            others = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
            connection.exec_driver_sql(others)

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == waiting:
                come_back()

        monkeypatch.setattr(module.time, "sleep", sleep)
        return waits

    def come_back() -> None:
        if engine.name == "sqlite":
            connection.exec_driver_sql("ROLLBACK")
        else:
            connection.exec_driver_sql(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")

    yield leave
    connection.close()
    engine.dispose()


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_the_end_of_a_run_waits_for_a_store_that_is_busy_or_away(absent, store, status):
    run = begun(store)
    waits = absent(3)
    ended(store, run, status)
    assert waits == [0.5, 1, 2]
    assert store.run(run.id).status == status


def test_a_figure_waits_for_a_store_that_is_busy_or_away_and_is_kept_once(absent, store):
    run = begun(store)
    waits = absent(2)
    run.record("tokens", 7, better="higher")
    run.log("behind it")
    assert waits == [0.5, 1]
    back = store.run(run.id)
    assert [m.value for m in back.measurements] == [7] and [log.message for log in back.logs] == ["behind it"]


def test_pauses_grow_to_half_a_minute(absent, store):
    run = begun(store)
    waits = absent(9)
    ended(store, run)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_progress_waits_for_nobody(absent, store):
    run = begun(store)
    waits = absent(1)
    with run.progress(2, "training") as bar:
        bar.advance()
    assert waits == [] and run.status == "running"


def test_who_interrupts_the_waiting_does_not_undo_the_run(absent, store, monkeypatch):
    run = begun(store)
    absent(1)
    sleep = module.time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ended(store, run)
    assert store.run(run.id).status == "finished"


def test_a_store_that_stays_away_is_given_up_and_how_the_run_ended_is_told(absent, store, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 3)
    run = begun(store)
    waits = absent(99)
    with pytest.raises(
        UsageError, match=f"run {run.id} is finished, but that is not kept: the store .* does not answer"
    ):
        ended(store, run)
    assert waits and waits == [0.5, 1, 2][: len(waits)]


def test_what_may_have_been_written_is_not_written_again(store, monkeypatch):
    run, tried = begun(store), []

    def lost(self: Store, run_id: str, entry: object) -> None:
        tried.append(entry)
        with self._answering():
            raise OperationalError("COMMIT", {}, Exception("the connection was lost"), connection_invalidated=True)

    monkeypatch.setattr(Store, "_write", lost)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(module, "_PATIENCE", 3)
    with pytest.raises(UsageError, match="does not answer"):
        run.log("once")
    assert len(tried) == 1


def test_the_latest_run_is_the_newest_that_finished(store):
    assert store.latest("hydra") is None
    finished = ended(store, begun(store))
    ended(store, begun(store), "failed")
    assert store.latest("hydra").id == finished.id


def test_a_tiny_run_is_kept_and_is_never_the_latest(store):
    ended(store, begun(store, scale="tiny"))
    assert store.latest("hydra") is None and store.runs("hydra", tiny=False) == []
    kept = ended(store, begun(store, scale="default"))
    tiny = ended(store, begun(store, scale="tiny"))
    assert store.latest("hydra").id == kept.id and [run.id for run in store.runs("hydra", tiny=False)] == [kept.id]
    assert {run.id for run in store.runs("hydra")} >= {kept.id, tiny.id} and len(store.runs("hydra")) == 3


def test_an_unknown_run_is_refused(store):
    with pytest.raises(UsageError, match="there is no run 'nobody'"):
        store.run("nobody")


def test_an_entry_of_an_unknown_run_is_refused(store):
    with pytest.raises(IntegrityError):
        store.add("nobody", Log("message", 0.0))


def test_a_run_whose_process_is_gone_is_interrupted(store, store_url):
    run = begun(store)
    run.record("tokens", 1, better="higher")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _set(store_url, pid=gone.pid)
    back = store.run(run.id)
    assert back.status == "interrupted" and "process ended" in back.error
    assert [m.value for m in back.measurements] == [1]
    assert back.finished is not None


def test_a_process_that_was_given_the_number_of_another_is_another(store, store_url):
    begun(store)
    assert store.runs()[0].status == "running"
    _set(store_url, process_started=psutil.Process().create_time() - 100)
    assert store.runs()[0].status == "interrupted"


def test_a_run_of_another_host_is_interrupted_when_its_heart_has_stopped(store, store_url):
    begun(store)
    _set(store_url, host=platform.node() + "-else", pid=2**22 + 1, heartbeat=time.time() - 50)
    assert store.runs()[0].status == "running"
    _set(store_url, heartbeat=time.time() - 70)
    assert store.runs()[0].status == "interrupted"


def test_a_heartbeat_keeps_a_run_of_another_host_running(store, store_url):
    run = begun(store)
    _set(store_url, host="elsewhere", heartbeat=time.time() - 70)
    store.beat(run.id)
    assert store.runs()[0].status == "running"


def test_a_run_that_ends_after_all_is_finished(store, store_url):
    run = begun(store)
    _set(store_url, host="elsewhere", heartbeat=time.time() - 70)
    assert store.runs()[0].status == "interrupted"
    run.status = "finished"
    store.end(run)
    assert (store.runs()[0].status, store.runs()[0].error) == ("finished", None)


def _record_200(url: str, start: float) -> None:
    with Store(url) as store:
        run = begun(store)
        time.sleep(max(0.0, start - time.time()))
        for step in range(200):
            run.record("step", step, better="higher")
        ended(store, run)


def test_two_processes_write_at_once_and_nothing_is_lost(store_url):
    context = multiprocessing.get_context("spawn")
    start = time.time() + 3
    writers = [context.Process(target=_record_200, args=(store_url, start)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    with Store(store_url) as store:
        assert len(store.runs()) == 2
        for run in store.runs():
            assert run.status == "finished"
            assert [m.value for m in run.measurements] == list(range(200))


def _count_up(url: str, start: float) -> None:
    with Store(url) as store:
        time.sleep(max(0.0, start - time.time()))
        for _ in range(30):
            with store.writing(alone=True) as session:
                seed = session.scalar(select(RunRow.seed))
                session.execute(update(RunRow).values(seed=seed + 1))


def test_what_one_reads_who_writes_alone_stays_true_until_it_has_written(store, store_url):
    begun(store, seed=0)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_count_up, args=(store_url, time.time() + 3)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 3
    with store.reading() as session:
        assert session.scalar(select(RunRow.seed)) == 90


def test_a_writer_that_raises_has_written_nothing(store):
    begun(store, seed=0)
    with pytest.raises(RuntimeError), store.writing() as session:
        session.execute(update(RunRow).values(seed=7))
        raise RuntimeError
    with store.reading() as session:
        assert session.scalar(select(RunRow.seed)) == 0


def test_processes_that_open_an_empty_store_at_once_make_it_once(store_url):
    code = (
        "import sys, time; from paperworks.lab import Store; "
        "time.sleep(max(0, float(sys.argv[2]) - time.time())); Store(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, store_url, str(time.time() + 2)]
    openers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [opener.communicate()[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0] * 4, errors
    with Store(store_url) as store:
        assert store.runs() == []


def test_the_migrations_build_what_the_models_say(store_url):
    Store(store_url).close()
    engine = create_engine(store_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == SCHEMA
    engine.dispose()


def test_the_schema_is_the_newest_migration():
    config = Config()
    config.set_main_option("script_location", str(Path(module.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA


def test_upgrading_a_store_at_the_first_revision_keeps_its_rows(store_url, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCHEMA", "0001")
    with Store(store_url) as old:
        run = begun(old)
        run.record("tokens", 7, better="higher")
        ended(old, run)
    _add_migration_of_tomorrow(tmp_path, monkeypatch)
    with Store(store_url) as upgraded:
        back = upgraded.run(run.id)
        assert (back.status, [m.value for m in back.measurements]) == ("finished", [7])
    engine = create_engine(store_url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT mood FROM runs")) == "curious"
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "tomorrow"
    engine.dispose()


def test_a_store_of_a_newer_paperworks_is_refused_and_left_alone(store_url):
    with Store(store_url) as store:
        ended(store, begun(store))
    engine = create_engine(store_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UsageError, match=r"written by a newer paperworks \(schema 9999\); pip install --upgrade"):
        Store(store_url)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM runs")) == 1
    engine.dispose()


def test_a_server_that_does_not_answer_is_one_sentence_without_the_password():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(UsageError) as refused:
        Store(f"postgresql+psycopg://ann:s3cret@127.0.0.1:{port}/runs?sslpassword=t0p")
    assert time.monotonic() - started < 30
    message = str(refused.value)
    assert message.startswith(f"the store postgresql+psycopg://ann:***@127.0.0.1:{port}/runs")
    assert "does not answer" in message and "PAPERWORKS_STORE" in message
    assert "s3cret" not in message and "t0p" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("runs.db", "the store's URL 'runs.db' is not one"),
        ("postgres//ann:s3cret@host", r"the store's URL 'postgres//ann:\*\*\*@host' is not one"),
        ("mysql://ann:s3cret@host/runs", r"mysql://ann:\*\*\*@host/runs is of a kind unknown here"),
        ("sqlite://", "is no file"),
        ("sqlite:///:memory:", "is no file"),
        ("postgresql+psycopg://host:port/runs", "is not one"),
    ],
)
def test_a_url_that_names_no_store_is_refused(url, message):
    with pytest.raises(UsageError, match=message) as refused:
        Store(url)
    assert "give sqlite:////path/to/runs.db or postgresql+psycopg://" in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_a_store_that_needs_a_missing_driver_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "psycopg\[binary\]"'):
        Store("postgresql://localhost/runs")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "runs.db"
    file.write_text("my diary, nothing to do with databases. " * 50)
    with pytest.raises(UsageError, match=r"does not answer \(file is not a database\)"):
        Store(file)
    assert file.read_text().startswith("my diary")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be made"):
        Store(tmp_path / "file" / "folder" / "runs.db")


def test_a_store_that_goes_away_is_one_sentence(tmp_path):
    store = Store(tmp_path / "runs.db")
    run = begun(store)
    with sqlite3.connect(tmp_path / "runs.db") as connection:
        connection.execute("DROP TABLE measurements")
    with pytest.raises(UsageError, match="does not answer"):
        run.record("tokens", 1, better="higher")


def test_the_default_store_is_what_the_environment_says_or_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERWORKS_STORE", f"sqlite:///{tmp_path}/chosen.db")
    assert Store().url == f"sqlite:///{tmp_path}/chosen.db"
    monkeypatch.delenv("PAPERWORKS_STORE")
    monkeypatch.setattr(module, "user_data_path", lambda name: tmp_path / "data" / name)
    store = Store()
    assert store.url == f"sqlite:///{tmp_path}/data/paperworks/runs.db"
    assert store.artefacts == tmp_path / "data" / "paperworks" / "artefacts"


def _set(url: str, **values: object) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(update(RunRow).values(**values))
    engine.dispose()


def _add_migration_of_tomorrow(tmp_path, monkeypatch) -> None:
    import shutil

    folder = tmp_path / "100 % migrations"
    shutil.copytree(Path(module.__file__).parent / "migrations", folder)
    (folder / "versions" / "9999_tomorrow.py").write_text(
        "import sqlalchemy as sa\n"
        "from alembic import op\n"
        f"revision, down_revision = 'tomorrow', {SCHEMA!r}\n"
        "def upgrade():\n"
        "    op.add_column('runs', sa.Column('mood', sa.String(), server_default='curious'))\n"
    )
    monkeypatch.setattr(module, "_MIGRATIONS", folder)
    monkeypatch.setattr(module, "SCHEMA", "tomorrow")
