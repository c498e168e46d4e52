"""What the commands share: options, JSON and the terminal."""

from __future__ import annotations

import json
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
