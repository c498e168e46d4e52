"""Where runs take place: in this process, or on a Ray cluster.

On Ray a recipe runs in one task of the cluster. All it records travels back at once over a queue, and only
the calling process writes the store: so any store will do, progress is seen live, and what was recorded
before a worker died is kept. A run asks for one CPU and, where the cluster has any, one GPU; `Run.map`
spreads its items over tasks of one CPU.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Protocol
from urllib.parse import urlsplit

from paperworks.errors import PaperworksError, UsageError, missing_extra
from paperworks.lab.display import Display
from paperworks.lab.environment import environment
from paperworks.lab.recipe import Recipe, find
from paperworks.lab.run import Artefact, Entry, Environment, Run, Status, one_by_one
from paperworks.lab.store import Store
from paperworks.papers import Source, load_cards, source_of, sources

_HEARTBEAT = 10.0


def execute(
    recipe: Recipe | str,
    *,
    parameters: Mapping[str, object] | None = None,
    scale: str = "default",
    seed: int = 0,
    store: Store | str | Path | None = None,
    on: str = "here",
    show_progress: bool = True,
    run_id: str | None = None,
    stopped: Callable[[], str] = str,
) -> Run:
    """Execute a recipe and keep the run, however it ends.

    Args:
        recipe: The recipe, or the slug of its paper.
        parameters: Options of the recipe, typed or as text.
        scale: "tiny", "default" or "paper".
        seed: Seed of all that is random, at least 0.
        store: Where the run is kept, as for `Store`.
        on: "here", "ray" (a Ray of this machine, started where none is), "auto" (the Ray cluster this machine
            is part of) or "ray://host:port".
        show_progress: Show progress on the error stream.
        run_id: Its identity, where it has been announced already; made from the time by default.
        stopped: Says why the run was interrupted, "" where it was not: libraries turn interruptions into errors of
            their own.

    Returns:
        The run: finished, or failed with its error and traceback. A recipe that leaves by `sys.exit` has failed.

    Raises:
        UsageError: The recipe, an option, the scale, the store or the place is unknown, the place lacks the package that
            brings the recipe, or the run of this identity has begun or is over; nothing is stored.
        KeyboardInterrupt: The user or a signal stopped it; by then the run is kept as interrupted.

    Example:
        >>> import tempfile
        >>> from paperworks.lab import recipe
        >>> @recipe(paper="square")
        ... def square(run: Run, side: float = 2.0) -> None:
        ...     run.record("area", side**2, better="higher")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = execute(square, parameters={"side": "3"}, store=Path(folder) / "runs.db")
        >>> run.status, run.measurements[0].value
        ('finished', 9.0)
    """
    chosen = find(recipe) if isinstance(recipe, str) else recipe
    options = chosen.plain(parameters, scale)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed is a whole number of at least 0, not {seed!r}")
    place = executor(on)
    place.check(chosen)
    if isinstance(store, Store):
        return _execute(chosen, options, scale, seed, store, place, show_progress, run_id, stopped)
    with Store(store) as opened:
        return _execute(chosen, options, scale, seed, opened, place, show_progress, run_id, stopped)


def _execute(
    recipe: Recipe,
    options: dict[str, Any],
    scale: str,
    seed: int,
    store: Store,
    place: Executor,
    show_progress: bool,
    run_id: str | None = None,
    stopped: Callable[[], str] = str,
) -> Run:
    with Display(recipe.paper) if show_progress else nullcontext() as display:
        run = Run(
            recipe.paper,
            options,
            seed=seed,
            scale=scale,
            id=run_id,
            artefacts=store.artefacts,
            recorder=store,
            parallel=place.map,
            display=display,
        )
        run.environment = environment()
        store.begin(run)
        with _heartbeat(store, run), _signals() as came:
            _carry_out(recipe, run, store, place, lambda: stopped() or next(iter(came), ""))
    return run


def _carry_out(recipe: Recipe, run: Run, store: Store, place: Executor, stopped: Callable[[], str]) -> None:
    try:
        place.work(recipe, run)
        _end(run, "finished")
    except KeyboardInterrupt as stop:
        _end(run, "interrupted", stop, stopped() or str(stop) or "stopped by the user")
        raise
    except (Exception, SystemExit) as error:
        # Libraries turn interruptions into errors of their own, and handlers of signals into exits.
        if reason := stopped():
            _end(run, "interrupted", error, reason)
            if isinstance(error, SystemExit):
                raise
            raise KeyboardInterrupt(reason) from error
        _end(run, "failed", error, _sentence(error))
    except BaseException as error:
        _end(run, "failed", error, _sentence(error))
        raise
    finally:
        store.end(run)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Why the process is asked to end, as signals come; one that would end it at once interrupts the run instead."""
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        # Signals reach the main thread alone.
        yield came
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: FrameType | None) -> None:
        came.append("stopped by the user" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
        handler = before[number]  # type: ignore[index]
        if callable(handler):
            handler(number, frame)
        else:
            # The second one ends the process, whatever the recipe is at.
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt(came[-1])

    handled = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in handled:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)


def _end(run: Run, status: Status, exception: BaseException | None = None, sentence: str | None = None) -> None:
    run.status, run.finished, run.bars = status, datetime.now(UTC), ()
    run.exception, run.error = exception, sentence
    if exception is not None:
        run.traceback = "".join(traceback.format_exception(exception))


def _sentence(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, SystemExit):
        return f"the recipe left by sys.exit({'' if error.code is None else repr(error.code)}) before its end"
    if isinstance(error, PaperworksError):
        return first
    if isinstance(error, ModuleNotFoundError) and (lacks := missing_extra(error)):
        return lacks
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


@contextmanager
def _heartbeat(store: Store, run: Run) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT):
            # A store that is away for a moment is not the run's concern: the next beat may reach it.
            with suppress(UsageError):
                store.beat(run.id)

    thread = threading.Thread(target=beat, name=f"heartbeat of {run.id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _work(recipe: Recipe, run: Run) -> None:
    if not run.environment:
        run.keep(Environment(environment()))
    try:
        recipe(run, **run.parameters)
    finally:
        # By now the recipe has loaded its libraries, which know of threads and GPU.
        run.keep(Environment(environment()))
        run.keep_files()


class Executor(Protocol):
    """A place where runs take place."""

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that cannot be carried out there, before a run of it begins."""

    def work(self, recipe: Recipe, run: Run) -> None:
        """Carry out the recipe and have all it records kept by the run."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any], advance: Callable[[], None] = ...) -> list[Any]:
        """Apply a function to every item and return the results in order."""


def executor(on: str = "here") -> Executor:
    """The place that a word names, ready for work.

    Args:
        on: As for `execute`.

    Raises:
        UsageError: The word names no place, Ray is not installed, or no cluster answers there.

    Example:
        >>> executor("here").map(abs, [-1, 2])
        [1, 2]
    """
    if on == "here":
        return Here()
    if on in ("ray", "auto") or on.startswith("ray://"):
        return OnRay(on)
    raise UsageError(f"on {on!r} is no place to run; choose here, ray, auto or ray://host:port")


class Here:
    """This process."""

    def check(self, recipe: Recipe) -> None:
        """What is found here can be carried out here."""

    def work(self, recipe: Recipe, run: Run) -> None:
        """Carry out the recipe in this process."""
        _work(recipe, run)

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], advance: Callable[[], None] = lambda: None
    ) -> list[Any]:
        """Apply a function to every item, one after the other."""
        return one_by_one(function, items, advance)


class OnRay:
    """A Ray cluster.

    Folders of papers that are included travel with the process that joins it, to all its workers.

    Args:
        on: "ray", "auto" or "ray://host:port", as for `execute`. A Ray that this process has joined already
            is used as it is.

    Raises:
        UsageError: Ray is not installed or no cluster answers.
    """

    def __init__(self, on: str = "ray") -> None:
        try:
            self._ray = importlib.import_module("ray")
        except ImportError:
            raise UsageError(f'running on {on} needs Ray: pip install "paperworks[ray]"') from None
        if not self._ray.is_initialized():
            _join(self._ray, on)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe whose package no worker has: that of a plugin, or a folder included after Ray was joined.

        Raises:
            UsageError: A worker that was asked lacks it.
        """
        paper = load_cards().get(recipe.paper)
        source = source_of(paper) if paper is not None else None
        if source is None:
            return
        names = [source.module] if source.module else [path.stem for path in _modules(source)]
        if lacking := self._result(self._ray.remote(num_cpus=1)(_lacks).remote(names)):
            raise UsageError(
                f"workers of this Ray lack {' and '.join(lacking)}, where {recipe.paper} comes from ({source.name}): install "
                "it there, or include its folder before Ray is joined"
            )
        if not source.module:
            # A recipe's file bears a name of its own here, by which it cannot be imported there.
            self._ray.cloudpickle.register_pickle_by_value(sys.modules[recipe.function.__module__])

    def work(self, recipe: Recipe, run: Run) -> None:
        """Carry out the recipe in one task of the cluster, and keep here what it records there."""
        ray = self._ray
        queue = importlib.import_module("ray.util.queue").Queue()
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        # A second try would record everything twice.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_work_there)
        job = (recipe, run.parameters, run.seed, run.scale, run.id)
        task = remote.remote(*job, queue)
        try:
            done = False
            while not done:
                done = bool(ray.wait([task], timeout=0.1)[0])
                for entry in queue.get_nowait_batch(queue.qsize()):
                    run.keep(entry)
            self._result(task)
        finally:
            ray.cancel(task)
            queue.shutdown()

    def map(
        self, function: Callable[[Any], Any], items: Sequence[Any], advance: Callable[[], None] = lambda: None
    ) -> list[Any]:
        """Apply a function to every item, each in its own task of one CPU."""
        ray = self._ray
        apply = ray.remote(num_cpus=1)(_apply)
        shared = ray.put(function)
        tasks = [apply.remote(shared, item) for item in items]
        waiting = list(tasks)
        try:
            while waiting:
                [task], waiting = ray.wait(waiting)
                self._result(task)
                advance()
        finally:
            for task in waiting:
                ray.cancel(task)
        return [self._result(task) for task in tasks]

    def _result(self, task: Any) -> Any:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise


def _modules(source: Source) -> list[Path]:
    """The package that brings a paper, or what lies in a folder that is none and can be imported where a recipe of it runs."""
    if source.module:
        return [source.folder]
    # What bears the name of a module of Python's does not stand in for it here, nor there.
    return [
        path
        for path in sorted(source.folder.iterdir())
        if path.stem not in sys.stdlib_module_names and (path.suffix == ".py" or (path / "__init__.py").is_file())
    ]


def _lacks(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _work_there(recipe: Recipe, parameters: dict[str, Any], seed: int, scale: str, run_id: str, queue: Any) -> None:
    with TemporaryDirectory() as folder:
        line = _Line(queue, Path(folder))
        run = Run(
            recipe.paper,
            parameters,
            seed=seed,
            scale=scale,
            id=run_id,
            artefacts=Path(folder),
            recorder=line,
            parallel=OnRay().map,
        )
        try:
            _work(recipe, run)
        except SystemExit as stop:
            # It would end Ray's worker, and nobody would learn why.
            raise PaperworksError(_sentence(stop)) from stop


class _Line:
    """Sends what a run records to the process that has the store."""

    def __init__(self, queue: Any, artefacts: Path) -> None:
        self._queue, self._artefacts = queue, artefacts

    def add(self, run_id: str, entry: Entry) -> None:
        if isinstance(entry, Artefact) and entry.content is None:
            entry = replace(entry, content=(self._artefacts / run_id / entry.path).read_bytes())
        self._queue.put(entry)


def _join(ray: Any, on: str) -> None:
    options: dict[str, Any] = {"namespace": "paperworks", "log_to_driver": False, "logging_level": "ERROR"}
    if brought := [str(path) for source in sources() if source.included for path in _modules(source)]:
        options["runtime_env"] = {"py_modules": brought}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if on == "ray":
            ray.init(address="local", include_dashboard=False, **options)
            return
        if on != "auto":
            # Ray itself would try for half a minute.
            place = urlsplit(on)
            socket.create_connection((place.hostname or "", place.port or 10001), timeout=5).close()
        ray.init(address=on, **options)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no Ray cluster answers at {on} ({error}); start one with `ray start --head`, set RAY_AUTH_MODE "
            "and RAY_AUTH_TOKEN where it asks for a token, or leave --on out"
        ) from error
