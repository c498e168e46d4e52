"""Runs: one execution of a recipe, and what a recipe calls to record what it finds."""

from __future__ import annotations

import io
import itertools
import math
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from paperworks.errors import PaperworksError
from paperworks.lab.measure import Effect, difference_of_pairs, ratio_of_pairs, speed_ratio, time_in_turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from paperworks.lab.display import Display

Status = Literal["running", "finished", "failed", "interrupted"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Measurement:
    """One figure that a run recorded.

    Args:
        name: What was measured, "perplexity".
        value: The figure, finite.
        unit: Its unit, empty for plain numbers.
        better: Which direction is better.
        series: The row it belongs to, "Hydra".
        low: Lower end of its 95 % interval, where it has one.
        high: Upper end.
        repeats: The figures behind the value, where there are several: of a ratio or difference, that of each pair.
        against: What a ratio or difference is taken to.
    """

    name: str
    value: float
    unit: str = ""
    better: Better = "higher"
    series: str | None = None
    low: float | None = None
    high: float | None = None
    repeats: list[float] = field(default_factory=list)
    against: str | None = None

    @property
    def no_effect(self) -> float | None:
        """What it would be if method and baseline were alike: 1 of a ratio, 0 of a difference, None of a plain figure.

        Example:
            >>> Measurement("speed-up", 1.5, "x", against="plain decoding").no_effect
            1.0
        """
        if self.against is None:
            return None
        return 1.0 if self.unit == "x" else 0.0

    @property
    def ends(self) -> tuple[float, float]:
        """Both ends of its interval; the value itself where it has none."""
        return self.value if self.low is None else self.low, self.value if self.high is None else self.high


@dataclass(frozen=True)
class Log:
    """A message of a run, at seconds since 1970 UTC."""

    message: str
    at: float


@dataclass(frozen=True)
class Artefact:
    """A file of a run, by its path in the artefact folder, with its bytes where it is not there yet."""

    name: str
    path: str
    content: bytes | None = None


@dataclass(frozen=True)
class Environment:
    """Where a run takes place, as `paperworks.lab.environment.environment` tells it."""

    values: dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """How far one piece of work is; `total` is None where nobody knows."""

    key: int
    description: str
    done: float
    total: float | None


@dataclass(frozen=True)
class Bars:
    """The pieces of work under way in a run."""

    bars: tuple[Bar, ...]


Entry = Measurement | Log | Artefact | Environment | Bars


class Recorder(Protocol):
    """Whoever keeps what a run records: the store, or a line to the process that has the store."""

    def add(self, run_id: str, entry: Entry) -> None:
        """Keep one entry of a run at once."""


class Run:
    """One execution of a recipe.

    Recipes get one from `paperworks.lab.execute`, which keeps all they record in the store at once. Made by
    hand, a run keeps its record in memory only, which is handy in a notebook.

    Args:
        paper: Slug of the paper.
        parameters: Values of the recipe's parameters, as JSON holds them.
        seed: Seed of all that is random.
        scale: Scale of the work: tiny, default or paper.
        id: Its identity in the store; made from the time by default.
        status: "running", "finished", "failed" or "interrupted".
        started: When it started, UTC.
        artefacts: Folder in which it has its own for files; a temporary folder by default.
        recorder: Who keeps its entries beside this object.
        parallel: `parallel(function, items, advance)` for `map`; one after the other by default.
        display: Shows progress.

    Attributes:
        environment: Machine and versions it ran on.
        measurements: What it recorded, in order.
        artefacts: Path of each file by name.
        logs: Its messages, in order.
        bars: The work under way.
        error: What stopped it, in one sentence.
        traceback: Where that happened.
        finished: When it ended, UTC.
        exception: The exception that stopped it, in the process that ran it.

    Example:
        >>> run = Run("hydra")
        >>> run.record("tokens", 64, better="higher", series="Hydra")
        >>> run.measurements[0].value
        64.0
    """

    def __init__(
        self,
        paper: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        scale: str = "default",
        id: str | None = None,
        status: Status = "running",
        started: datetime | None = None,
        artefacts: Path | None = None,
        recorder: Recorder | None = None,
        parallel: Callable[[Callable[[Any], Any], Sequence[Any], Callable[[], None]], list[Any]] | None = None,
        display: Display | None = None,
    ) -> None:
        self.paper = paper
        self.parameters = dict(parameters or {})
        self.seed = seed
        self.scale = scale
        self.status: Status = status
        self.started = started or datetime.now(UTC)
        self.id = id or f"{self.started:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
        self.finished: datetime | None = None
        self.environment: dict[str, Any] = {}
        self.measurements: list[Measurement] = []
        self.artefacts: dict[str, Path] = {}
        self.logs: list[Log] = []
        self.bars: tuple[Bar, ...] = ()
        self.error: str | None = None
        self.traceback: str | None = None
        self.exception: BaseException | None = None
        self._artefact_root = artefacts
        self._recorder = recorder
        self._parallel = parallel
        self._display = display
        self._open: list[Progress] = []
        self._bars_kept = -math.inf
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"<Run {self.id} of {self.paper}: {self.status}, {len(self.measurements)} measurements>"

    @property
    def artefact_folder(self) -> Path:
        """The folder for files of this run; whatever a recipe leaves there is kept with the run."""
        if self._artefact_root is None:
            self._artefact_root = Path(tempfile.mkdtemp(prefix="paperworks-"))
        folder = self._artefact_root / self.id
        if self.status == "running":
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, name: str, value: float, *, unit: str = "", better: Better, series: str | None = None) -> None:
        """Record one figure; it is in the store when this returns.

        Args:
            name: What was measured, "perplexity".
            value: The figure.
            unit: Its unit, empty for plain numbers.
            better: Which direction is better, "higher" or "lower".
            series: The row of the results it belongs to, "Hydra".

        Raises:
            ValueError: The value is not finite, the name is empty, or `better` is neither.
        """
        self.keep(Measurement(name, float(value), unit, better, series))

    def mean(
        self, name: str, figures: Sequence[float], *, unit: str = "", better: Better, series: str | None = None
    ) -> Effect:
        """Record the mean of one figure a seed or prompt, with its 95 % interval by Student's t.

        Args:
            name: What was measured, "rank correlation".
            figures: Independent figures, finite.
            unit: Their unit, empty for plain numbers.
            better: Which direction is better.
            series: The row of the results it belongs to.

        Example:
            >>> run = Run("hydra")
            >>> print(run.mean("rank correlation", [0.82, 0.86, 0.84], better="higher"))
            0.84 [0.79, 0.89]
        """
        mean = difference_of_pairs(figures, [0.0] * len(figures), unit=unit)
        self.keep(Measurement(name, mean.value, unit, better, series, mean.low, mean.high, list(mean.repeats)))
        return mean

    def ratio(
        self,
        name: str,
        *,
        method: Sequence[float],
        baseline: Sequence[float],
        better: Better = "higher",
        series: str | None = None,
        against: str | None = None,
        test_to_train: float | None = None,
    ) -> Effect:
        """Record the ratio to a baseline over independent pairs, with its 95 % interval.

        Args:
            name: What the ratio is of, "accepted tokens".
            method: One figure of the method a prompt or seed, as `paperworks.lab.measure.ratio_of_pairs` takes them.
            baseline: The baseline's figure for the same ones.
            better: Which direction is better.
            series: The row of the results it belongs to.
            against: Name of the baseline, "baseline" where there is but one.
            test_to_train: n_test / n_train where pairs are random splits of one data set.

        Returns:
            The ratio, its interval and the ratio of each pair.

        Raises:
            ValueError: The samples are not pairs of finite figures, or the baseline's mean is zero.

        Example:
            >>> run = Run("hydra")
            >>> print(run.ratio("accepted", method=[3.1, 2.9, 3.3], baseline=[2.0, 2.1, 1.9]))
            1.55x [1.17, 2.06]
        """
        ratio = ratio_of_pairs(method, baseline, test_to_train=test_to_train)
        self._keep_effect(name, ratio, better=better, series=series, against=against or "baseline")
        return ratio

    def difference(
        self,
        name: str,
        *,
        method: Sequence[float],
        baseline: Sequence[float],
        unit: str = "",
        better: Better = "higher",
        series: str | None = None,
        against: str | None = None,
        test_to_train: float | None = None,
    ) -> Effect:
        """Record the mean difference to a baseline over independent pairs, with its 95 % interval; no effect is 0.

        Args:
            name: What differs, "accuracy gained".
            method: As for `ratio`; figures may be zero or negative.
            baseline: As for `ratio`.
            unit: Unit of the figures.
            better: Which direction is better.
            series: The row of the results it belongs to.
            against: Name of the baseline, "baseline" where there is but one.
            test_to_train: As for `ratio`.

        Raises:
            ValueError: The samples are not pairs of finite figures.

        Example:
            >>> run = Run("hydra")
            >>> print(run.difference("accuracy gained", method=[0.95, 0.93, 0.97], baseline=[0.90, 0.91, 0.91]))
            0.04 [-0.01, 0.10]
        """
        gained = difference_of_pairs(method, baseline, unit=unit, test_to_train=test_to_train)
        self._keep_effect(name, gained, better=better, series=series, against=against or "baseline")
        return gained

    def compare(
        self,
        *,
        baseline: Callable[..., object] | tuple[str, Callable[..., object]],
        method: Callable[..., object] | Mapping[str, Callable[..., object]],
        repeats: int = 5,
        over: Sequence[Any] | None = None,
        warmup: int = 1,
        unit: str = "s",
    ) -> dict[str, Effect]:
        """Time methods against their baseline, turn by turn, and record how much faster they run.

        A call that returns a number has done that much work, and rates are recorded as "speed"; otherwise
        seconds are, as "time". Either way each method's "speed-up" is recorded: its speed over the baseline's, above
        1 where it is faster, as `paperworks.lab.measure.speed_ratio` takes it over the items. One item has no interval.

        Args:
            baseline: The call to compare with, or its name and the call.
            method: One call, or several by name.
            repeats: How often each call has its turn for each item.
            over: Items each call is made with, `call(item)`; without them it is `call()`.
            warmup: Rounds with the first item before the timed ones.
            unit: Unit of the times or rates, "tokens/s".

        Returns:
            The speed-up of each method by name; a single unnamed one is "method".

        Raises:
            ValueError: There is nothing to time, or two calls bear one name.
            TypeError: Some calls return their work as a number and others do not.

        Example:
            >>> run = Run("sorting")
            >>> data = [list(range(1000)), list(range(2000))]
            >>> faster = run.compare(baseline=("sort", sorted), method={"max": lambda x: [max(x)]}, over=data)
            >>> [(m.name, m.series) for m in run.measurements]
            [('time', 'sort'), ('time', 'max'), ('speed-up', 'max')]
        """
        first, call = baseline if isinstance(baseline, tuple) else ("baseline", baseline)
        methods = method if isinstance(method, Mapping) else {"method": method}
        if first in methods or not methods:
            raise ValueError(f"compare takes at least one method, none named {first!r} as the baseline is")
        calls = {first: call, **methods}
        turns = len(calls) * (warmup + repeats * (1 if over is None else len(over)))
        with self.progress(turns, "timing in turn") as bar:
            timings = time_in_turn(calls, over=over, repeats=repeats, warmup=warmup, advance=bar.advance)
        for name, timing in timings.items():
            if timing.work is None:
                self._keep_median("time", timing.seconds, unit, "lower", name)
            else:
                self._keep_median("speed", timing.speed, "1/s" if unit == "s" else unit, "higher", name)
        ratios = {name: speed_ratio(timings[name].speed, timings[first].speed) for name in methods}
        for name, ratio in ratios.items():
            self._keep_effect("speed-up", ratio, better="higher", series=name, against=first)
        return ratios

    def _keep_median(self, name: str, figures: list[list[float]], unit: str, better: Better, series: str) -> None:
        flat = [figure for row in figures for figure in row]
        self.keep(Measurement(name, median(flat), unit, better, series, repeats=flat))

    def _keep_effect(self, name: str, effect: Effect, *, better: Better, series: str | None, against: str) -> None:
        each = list(effect.repeats)
        self.keep(Measurement(name, effect.value, effect.unit, better, series, effect.low, effect.high, each, against))

    def figure(self, fig: Figure, name: str = "figure") -> Path:
        """Save a figure as PNG with the run.

        Args:
            fig: A matplotlib figure.
            name: Its name, letters, digits, dots, hyphens and underscores.

        Returns:
            Where it is.

        Raises:
            ValueError: The name cannot be a file's.
        """
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"a figure's name has letters, digits, dots, hyphens and underscores, given {name!r}")
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        FigureCanvasAgg(fig).print_figure(content, format="png", dpi=150, bbox_inches="tight")
        self.keep(Artefact(name, f"{name}.png", content.getvalue()))
        return self.artefacts[name]

    def progress(self, total: int | Iterable[Any] | None = None, description: str = "") -> Progress:
        """Show how far a piece of work is; several may be under way at once.

        Args:
            total: How many steps there are, the items to iterate over, or None where nobody knows.
            description: What is being done.

        Example:
            >>> run = Run("hydra")
            >>> with run.progress(3, "training") as bar:
            ...     bar.advance(2)
            ...     run.bars[0].done
            2.0
            >>> [2 * item for item in run.progress([1, 2], "doubling")]
            [2, 4]
        """
        return Progress(self, total, description)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any], description: str = "") -> list[Any]:
        """Apply a function to every item, where the run was sent: in turn here, in parallel on Ray.

        Args:
            function: Takes an item; on Ray it and its results are pickled.
            items: The items.
            description: What is being done.

        Returns:
            The results, in the order of the items. The first exception raised is raised here.

        Example:
            >>> Run("hydra").map(abs, [-1, 2])
            [1, 2]
        """
        waiting = list(items)
        with self.progress(len(waiting), description) as bar:
            return (self._parallel or one_by_one)(function, waiting, bar.advance)

    def log(self, message: str) -> None:
        """Keep a message with the run, and show it where progress is shown."""
        self.keep(Log(message, time.time()))

    def keep(self, entry: Entry) -> None:
        """Take in one entry and hand it on to whoever keeps this run.

        Raises:
            PaperworksError: The run is over.
            ValueError: A measurement is not sound.
        """
        with self._lock:
            if self.status != "running":
                raise PaperworksError(f"run {self.id} is {self.status} and takes no more; execute the recipe again")
            match entry:
                case Measurement():
                    _check(entry)
                    self.measurements.append(entry)
                case Log():
                    self.logs.append(entry)
                case Artefact():
                    path = self.artefact_folder / entry.path
                    if entry.content is not None:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(entry.content)
                    self.artefacts[entry.name] = path
                case Environment():
                    self.environment = entry.values
                case Bars():
                    self.bars = entry.bars
            if self._display is not None:
                self._display.show(entry)
            if self._recorder is not None:
                self._recorder.add(self.id, entry)

    def keep_files(self) -> None:
        """Keep the files that the recipe left in the artefact folder by itself."""
        if self._artefact_root is None:
            return
        kept = set(self.artefacts.values())
        for path in sorted(self.artefact_folder.rglob("*")):
            if path.is_file() and path not in kept:
                name = path.relative_to(self.artefact_folder).as_posix()
                self.keep(Artefact(name, name))

    def progressed(self, *, turn: bool = False) -> None:
        """Take in how far the work is; whoever keeps the run hears of it once a second and at each turn.

        Args:
            turn: Whether a piece of work has just begun or ended.
        """
        with self._lock:
            # An iterator that was left early may close long after its run.
            if self.status != "running":
                return
            bars = Bars(tuple(progress.bar for progress in self._open))
            now = time.monotonic()
            if turn or now - self._bars_kept >= 1:
                self._bars_kept = now
                self.keep(bars)
                return
            self.bars = bars.bars
            if self._display is not None:
                self._display.show(bars)


def one_by_one(
    function: Callable[[Any], Any], items: Sequence[Any], advance: Callable[[], None] = lambda: None
) -> list[Any]:
    """Apply a function to every item in this process, in order.

    Example:
        >>> one_by_one(abs, [-1, 2])
        [1, 2]
    """
    results = []
    for item in items:
        results.append(function(item))
        advance()
    return results


def _check(measurement: Measurement) -> None:
    if not measurement.name:
        raise ValueError("a measurement needs a name; say what was measured")
    if measurement.better not in ("higher", "lower"):
        raise ValueError(f"{measurement.name}: better is 'higher' or 'lower', given {measurement.better!r}")
    if not math.isfinite(measurement.value):
        raise ValueError(
            f"{measurement.name} is {measurement.value}; only finite figures are recorded: "
            "look for what overflowed or divided by zero"
        )


_keys = itertools.count()


class Progress:
    """A piece of work under way in a run; use it in a `with` statement or iterate over it."""

    def __init__(self, run: Run, total: int | Iterable[Any] | None, description: str) -> None:
        self._run = run
        self._items: Iterable[Any] = range(total) if isinstance(total, int) else total if total is not None else ()
        size = len(self._items) if total is not None and isinstance(self._items, Sized) else None
        self.bar = Bar(next(_keys), description, 0.0, size)

    def advance(self, n: float = 1) -> None:
        """Say that `n` more steps are done."""
        with self._run._lock:
            self.bar = replace(self.bar, done=self.bar.done + n)
            self._run.progressed()

    def __enter__(self) -> Self:
        with self._run._lock:
            self._run._open.append(self)
            self._run.progressed(turn=True)
        return self

    def __exit__(self, *exception: object) -> None:
        with self._run._lock:
            self._run._open.remove(self)
            self._run.progressed(turn=True)

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items:
                yield item
                self.advance()
