"""The command line: list, search, show, claims, run, compare, generate, inspect, results, bench, ingest, serve, digest."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from paperworks import __version__
from paperworks.cli import bench, models, page, papers, runs
from paperworks.errors import PaperworksError, missing_extra

# Libraries draw bars and warn on the error stream, where progress and errors are told in the commands' own words.
_SILENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def app() -> typer.Typer:
    """The application, with a `run` command for every recipe there is."""
    program = typer.Typer(
        help="Papers that run: each method against what you would otherwise have used, on your own model and data.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        add_completion=False,
    )
    program.callback()(_shared_options)
    program.command("list", epilog="Example: `paperworks list --room decoding`")(papers.list_papers)
    program.command("search", epilog='Example: `paperworks search "make my llm faster"`')(papers.search_papers)
    program.command("show", epilog="Example: `paperworks show hydra`")(papers.show)
    program.command("claims", epilog="Example: `paperworks claims hydra`")(papers.claims)
    program.command(
        "compare",
        epilog="Example: `paperworks compare hydra chimera --new-tokens 64`",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(runs.compare)
    program.command("generate", epilog='Example: `paperworks generate --method hydra "Why is the sky blue?"`')(
        models.generate
    )
    program.command("results", epilog="Example: `paperworks results hydra`")(runs.results)
    program.command("inspect", epilog="Example: `paperworks inspect --model my_model.py:build --data digits`")(
        models.inspect_model
    )
    program.command("bench", epilog="Example: `paperworks bench hydra`")(bench.bench)
    program.command("serve", epilog="Example: `paperworks serve --port 8000`")(page.serve)
    program.command("digest", epilog="Example: `paperworks digest --dry-run --to digests`")(page.digest)
    program.add_typer(runs.run_commands(), name="run")
    program.add_typer(page.ingest_commands(), name="ingest")
    return program


def main() -> None:
    """Run the command line; errors are one sentence and an exit status."""
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    try:
        status = app()(standalone_mode=False)
        # Typer turns Ctrl-C into this status of its own.
        if status == 130:
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except PaperworksError as error:
        _fail(str(error), error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was recorded is kept", 130)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (lacks := missing_extra(error)):
            _fail(lacks, 2)
        # Click's usage errors know how to show themselves; anything else is a defect and keeps its traceback.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(sentence: str, status: int) -> None:
    print(f"paperworks: {sentence}", file=sys.stderr)
    sys.exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


def _shared_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass
