"""What the commands share: options, JSON, the terminal and its bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StoreOption = Annotated[
    str | None,
    typer.Option(help="Where runs are kept: sqlite:///FILE or postgresql+psycopg://…  [env: PAPERWORKS_STORE]"),
]


def print_json(value: Any) -> None:
    """Print a value for another program to read."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def terminal() -> Any:
    """Where tables and colours go."""
    from rich.console import Console

    return Console()


@contextmanager
def progress(*, hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal's error stream: told what is being done, how much is done and of how much."""
    from paperworks.lab.run import Bar, Bars, Display

    display = Display() if sys.stderr.isatty() and not hidden else None
    bars: dict[str, Bar] = {}

    def tell(what: str, done: int, total: int) -> None:
        bars[what] = Bar(list(bars).index(what) if what in bars else len(bars), what, done, total)
        if display:
            display.show(Bars(tuple(bars.values())))

    try:
        yield tell
    finally:
        if display:
            display.close()
