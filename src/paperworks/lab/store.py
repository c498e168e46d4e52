"""The store keeps runs and what they recorded: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import itertools
import os
import platform
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil
from platformdirs import user_data_path
from sqlalchemy import (
    JSON,
    Double,
    ForeignKey,
    Index,
    MetaData,
    create_engine,
    event,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from paperworks.errors import UsageError
from paperworks.lab.run import Artefact, Bar, Bars, Entry, Environment, Log, Measurement, Run, Status

SCHEMA = "0006"
_MIGRATIONS = Path(__file__).parent / "migrations"
_HEARTBEAT_LOST = 60.0
# Seconds that SQLite waits for other writers, and that a run waits for a store that is busy or away, rather than lose what
# it took minutes to find.
_BUSY = 30.0
_PATIENCE = 600.0
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
}
_CURE = "start it, or set PAPERWORKS_STORE to one that does"
# Alembic's context belongs to the process.
_migrating = threading.Lock()


class Base(DeclarativeBase):
    """The tables; Alembic compares them with what the migrations build."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {float: Double()}
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
        }
    )


class RunRow(Base):
    """A run; times are seconds since 1970 UTC."""

    __tablename__ = "runs"
    __table_args__ = (Index("ix_runs_paper", "paper", "started"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    paper: Mapped[str]
    parameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int]
    scale: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    started: Mapped[float]
    finished: Mapped[float | None]
    environment: Mapped[dict[str, Any]] = mapped_column(JSON)
    error: Mapped[str | None]
    traceback: Mapped[str | None]
    progress: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    host: Mapped[str]
    pid: Mapped[int]
    process_started: Mapped[float]
    heartbeat: Mapped[float]

    measurements: Mapped[list[MeasurementRow]] = relationship(order_by="MeasurementRow.id", lazy="selectin")
    artefacts: Mapped[list[ArtefactRow]] = relationship(order_by="ArtefactRow.id", lazy="selectin")
    logs: Mapped[list[LogRow]] = relationship(order_by="LogRow.id", lazy="selectin")


class MeasurementRow(Base):
    """A figure that a run recorded."""

    __tablename__ = "measurements"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    value: Mapped[float]
    unit: Mapped[str]
    better: Mapped[str]
    series: Mapped[str | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    repeats: Mapped[list[float]] = mapped_column(JSON)
    against: Mapped[str | None]


class ArtefactRow(Base):
    """A file of a run, by its path in the run's artefact folder."""

    __tablename__ = "artefacts"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    path: Mapped[str]


class LogRow(Base):
    """A message of a run."""

    __tablename__ = "logs"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), index=True)
    at: Mapped[float]
    message: Mapped[str]


class Store:
    """Runs and what they recorded, in a database that several processes may use at once.

    Opening a store creates it where it is missing, brings its tables up to date, and marks as interrupted the
    runs whose process is gone.

    Args:
        url: `sqlite:////path/to/runs.db` or `postgresql+psycopg://user@host/database`, or a `Path` for a
            SQLite file; by default what `PAPERWORKS_STORE` says, else a SQLite file in the user's data
            folder.
        artefacts: Folder for the files of runs; by default `artefacts` beside the SQLite file or in the
            user's data folder.

    Raises:
        UsageError: The URL is not one of these, the store does not answer, or a newer paperworks wrote it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "runs.db") as store:
        ...     run = Run("hydra", recorder=store)
        ...     store.begin(run)
        ...     run.record("tokens", 64, better="higher")
        ...     [(found.paper, found.measurements[0].value) for found in store.runs()]
        [('hydra', 64.0)]
    """

    def __init__(self, url: str | Path | None = None, *, artefacts: Path | None = None) -> None:
        self._url = _parsed(url or os.environ.get("PAPERWORKS_STORE") or user_data_path("paperworks") / "runs.db")
        if artefacts is None:
            beside = Path(str(self._url.database)).parent if self.sqlite else user_data_path("paperworks")
            artefacts = beside / "artefacts"
        self.artefacts = artefacts
        with self._answering():
            self._engine = self._connected()
            self._migrate()
        self._mark_interrupted()

    @property
    def url(self) -> str:
        """Where the store is, its password masked."""
        secret = {key: "***" for key in self._url.query if "password" in key}
        return self._url.update_query_dict(secret).render_as_string(hide_password=True)

    def close(self) -> None:
        """Close the connections to the database."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, run: Run) -> None:
        """Take in a run that this process starts now, or take over one that is announced and has not begun.

        A run has begun once it has an environment; one that begins at once brings its own.

        Raises:
            UsageError: The run has begun or is over: it would record everything twice.
        """
        self._mark_interrupted()
        with self.writing(alone=True) as session:
            kept = session.get(RunRow, run.id)
            if kept is not None and (kept.status != "running" or kept.environment):
                state = "under way" if kept.status == "running" else kept.status
                raise UsageError(f"run {run.id} is {state} already, and a run takes place once; start one of a new id")
            session.merge(row_of(run))

    def add(self, run_id: str, entry: Entry) -> None:
        """Keep one entry of a run; it is in the database when this returns.

        Where the store is busy or away, progress is let go, for the next is due in a second; all else waits.
        """
        if isinstance(entry, Bars):
            with suppress(UsageError):
                self._write(run_id, entry)
        else:
            self._patiently(lambda: self._write(run_id, entry))

    def _write(self, run_id: str, entry: Entry) -> None:
        with self.writing() as session:
            match entry:
                case Measurement():
                    session.add(MeasurementRow(run_id=run_id, **vars(entry)))
                case Log():
                    session.add(LogRow(run_id=run_id, at=entry.at, message=entry.message))
                case Artefact():
                    session.add(ArtefactRow(run_id=run_id, name=entry.name, path=entry.path))
                case Environment():
                    session.execute(_of(run_id).values(environment=entry.values))
                case Bars():
                    bars = [vars(bar) for bar in entry.bars]
                    session.execute(_of(run_id).values(progress=bars, heartbeat=time.time()))

    def beat(self, run_id: str) -> None:
        """Say that the process of a run is alive."""
        with self.writing() as session:
            session.execute(_of(run_id).values(heartbeat=time.time()))

    def end(self, run: Run) -> None:
        """Keep how a run ended.

        Raises:
            UsageError: The store has not answered for ten minutes.
        """
        finished = run.finished.timestamp() if run.finished else time.time()
        end = _of(run.id).values(
            status=run.status, finished=finished, error=run.error, traceback=run.traceback, progress=[]
        )

        def write() -> None:
            with self.writing() as session:
                session.execute(end)

        try:
            self._patiently(write, twice=True)
        except KeyboardInterrupt:
            # Who stops the waiting does not undo the run.
            write()
            raise
        except UsageError as error:
            raise UsageError(f"run {run.id} is {run.status}, but that is not kept: {error}") from error

    def _patiently(self, write: Callable[[], None], *, twice: bool = False) -> None:
        """Write, and try again while the store is busy or away.

        Args:
            write: Writes, or raises UsageError.
            twice: Whether the same may be written twice, so that it can be tried again where nobody knows whether it was
                written.
        """
        deadline = time.monotonic() + _PATIENCE
        for number in itertools.count():
            try:
                return write()
            except UsageError as error:
                pause = min(0.5 * 2**number, 30.0)
                if not _passing(error.__cause__, twice) or time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)

    def runs(
        self, paper: str | None = None, status: Status | None = None, limit: int | None = None, *, tiny: bool = True
    ) -> list[Run]:
        """The runs kept, newest first.

        Args:
            paper: Slug of the paper they are of.
            status: How they are: running, finished, failed or interrupted.
            limit: The most to return.
            tiny: Whether runs of scale tiny are among them, which show only that a recipe works.
        """
        self._mark_interrupted()
        query = select(RunRow).order_by(RunRow.started.desc(), RunRow.id.desc()).limit(limit)
        if paper is not None:
            query = query.where(RunRow.paper == paper)
        if status is not None:
            query = query.where(RunRow.status == status)
        if not tiny:
            query = query.where(RunRow.scale != "tiny")
        with self.reading() as session:
            return [self._run(row) for row in session.scalars(query)]

    def run(self, id: str) -> Run:
        """The run with this identity.

        Raises:
            UsageError: There is none.
        """
        self._mark_interrupted()
        with self.reading() as session:
            row = session.get(RunRow, id)
            if row is None:
                raise UsageError(f"there is no run {id!r} in {self.url}; `paperworks results` lists the runs")
            return self._run(row)

    def latest(self, paper: str) -> Run | None:
        """The newest finished run of a paper whose figures say something, or None: one of scale tiny does not count."""
        return next(iter(self.runs(paper, "finished", limit=1, tiny=False)), None)

    def _run(self, row: RunRow) -> Run:
        run = Run(
            row.paper,
            row.parameters,
            seed=row.seed,
            scale=row.scale,
            id=row.id,
            status=row.status,  # type: ignore[arg-type]
            started=datetime.fromtimestamp(row.started, UTC),
            artefacts=self.artefacts,
        )
        run.finished = None if row.finished is None else datetime.fromtimestamp(row.finished, UTC)
        run.environment, run.error, run.traceback = row.environment, row.error, row.traceback
        fields = Measurement.__dataclass_fields__
        run.measurements = [Measurement(**{name: getattr(kept, name) for name in fields}) for kept in row.measurements]
        run.artefacts = {kept.name: self.artefacts / row.id / kept.path for kept in row.artefacts}
        run.logs = [Log(kept.message, kept.at) for kept in row.logs]
        run.bars = tuple(Bar(**bar) for bar in row.progress)
        return run

    def _mark_interrupted(self) -> None:
        with self.reading() as session:
            running = session.scalars(select(RunRow).where(RunRow.status == "running")).all()
        for row in running:
            if _alive(row):
                continue
            mark = _of(row.id).where(RunRow.status == "running", RunRow.heartbeat == row.heartbeat)
            with self.writing() as session:
                session.execute(
                    mark.values(
                        status="interrupted",
                        finished=row.heartbeat,
                        error="its process ended before the run did; what it had recorded is kept",
                        progress=[],
                    )
                )

    @property
    def sqlite(self) -> bool:
        """Whether the database is a SQLite file; else it is PostgreSQL."""
        return self._url.get_backend_name() == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session to read with.

        Raises:
            UsageError: The database does not answer.
        """
        with self._answering(), Session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Session]:
        """A session to write with: its changes are in the database when the block ends, or none is when it raises.

        Args:
            alone: Whether other sessions that write alone wait meanwhile, so that what this one reads stays true
                until it has written.

        Raises:
            UsageError: The database does not answer.
        """
        with self._answering(), Session(self._engine) as session, session.begin():
            if alone:
                session.execute(text("BEGIN IMMEDIATE" if self.sqlite else "SELECT pg_advisory_xact_lock(727666)"))
            yield session

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (DataError, IntegrityError):
            raise
        except DBAPIError as error:
            reason = re.split(r"\n|(?<=failed): ", str(error.orig).strip())
            raise UsageError(f"the store {self.url} does not answer ({reason[-1] or reason[0]}); {_CURE}") from error

    def _connected(self) -> Engine:
        if not self.sqlite:
            return create_engine(self._url, connect_args={"connect_timeout": 5}, pool_pre_ping=True)
        try:
            Path(str(self._url.database)).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the store {self.url} cannot be made ({error.strerror}); {_CURE}") from error
        engine = create_engine(self._url, connect_args={"timeout": _BUSY})
        event.listen(engine, "connect", _prepare_sqlite)
        return engine

    def _migrate(self) -> None:
        with self._engine.connect() as connection:
            if _revision(connection) == SCHEMA:
                return
        with _migrating, self._engine.connect() as connection:
            # One process at a time: the others wait here, and find the work done.
            if self.sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(text("SELECT pg_advisory_xact_lock(727665)"))
            self._upgrade(connection)
            connection.commit()

    def _upgrade(self, connection: Connection) -> None:
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        revision = _revision(connection)
        try:
            ScriptDirectory.from_config(config).get_revision(revision or "head")
        except CommandError:
            raise UsageError(
                f"the store {self.url} was written by a newer paperworks (schema {revision}); "
                "pip install --upgrade paperworks, or set PAPERWORKS_STORE to another"
            ) from None
        command.upgrade(config, "head")


def row_of(run: Run) -> RunRow:
    """The row of a run that belongs to this process from now on."""
    process = psutil.Process()
    return RunRow(
        id=run.id,
        paper=run.paper,
        parameters=run.parameters,
        seed=run.seed,
        scale=run.scale,
        status=run.status,
        started=run.started.timestamp(),
        environment=run.environment,
        progress=[],
        host=platform.node(),
        pid=process.pid,
        process_started=process.create_time(),
        heartbeat=time.time(),
    )


def _passing(error: BaseException | None, twice: bool) -> bool:
    """Whether an error of the database is one of those that pass, and trying again does not write twice."""
    if not isinstance(error, OperationalError) or (error.connection_invalidated and not twice):
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code is None or code & 0xFF in _PASSING


def _of(run_id: str) -> Any:
    return update(RunRow).where(RunRow.id == run_id)


def _parsed(url: str | Path) -> URL:
    if isinstance(url, Path):
        return URL.create("sqlite", database=str(url.expanduser().absolute()))
    cure = "give sqlite:////path/to/runs.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UsageError(f"the store's URL {_masked(url)!r} is not one; {cure}") from None
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        if find_spec("psycopg") is None:
            raise UsageError(f'the store {shown} needs psycopg: pip install "psycopg[binary]"')
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername != "sqlite":
        raise UsageError(f"the store {shown} is of a kind unknown here; {cure}")
    if parsed.database in (None, "", ":memory:"):
        raise UsageError(f"the store {shown} is no file, and a run outlives its process; {cure}")
    return parsed


def _masked(url: str) -> str:
    return re.sub(r"(?<=:)[^:@/]+(?=@)", "***", url)


def _prepare_sqlite(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    # Connections read the system's copy of a page and need none of their own.
    cursor.execute(f"PRAGMA mmap_size={2**30}")
    cursor.close()


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _alive(row: RunRow) -> bool:
    if row.host != platform.node():
        return time.time() - row.heartbeat < _HEARTBEAT_LOST
    try:
        process = psutil.Process(row.pid)
        # A later process may have been given the same number.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - row.process_started) < 2
    except psutil.NoSuchProcess:
        return False
