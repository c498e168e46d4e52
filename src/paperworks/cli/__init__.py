"""The command line: list, search, show, claims, run, compare, generate, train-drafter, inspect, results, bench, ingest, serve, digest, mail."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from paperworks import __version__
from paperworks.cli import bench, models, page, papers, runs
from paperworks.errors import PaperworksError, UsageError, missing_extra
from paperworks.papers import INCLUDE, PluginWarning

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
    program.command(
        "train-drafter",
        epilog="Example: `paperworks train-drafter --model PATH --method hydra --out hydra-for-my-model`",
    )(models.train_drafter)
    program.command("results", epilog="Example: `paperworks results hydra`")(runs.results)
    program.command("inspect", epilog="Example: `paperworks inspect --model my_model.py:build --data digits`")(
        models.inspect_model
    )
    program.command("bench", epilog="Example: `paperworks bench hydra`")(bench.bench)
    program.command("serve", epilog="Example: `paperworks serve --port 8000`")(page.serve)
    program.command("digest", epilog="Example: `paperworks digest --dry-run --to digests`")(page.digest)
    program.command("mail", epilog="Example: `paperworks mail`")(page.mail)
    program.add_typer(runs.run_commands(), name="run")
    program.add_typer(page.ingest_commands(), name="ingest")
    return program


def main() -> None:
    """Run the command line; errors are one sentence and an exit status."""
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    warnings.formatwarning = _told_in_a_line
    try:
        # Before the commands are made: each recipe that a folder brings has one.
        words = _include(sys.argv[1:])
        status = app()(words, standalone_mode=False)
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


def _include(words: Sequence[str]) -> list[str]:
    """Take `--include FOLDER` out of what was typed, wherever it stands, and have its papers found here and in processes begun from here."""
    left: list[str] = []
    folders: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            left += [word, *rest]
        elif word == "--include" or word.startswith("--include="):
            folder = word.partition("=")[2] if "=" in word else next(rest, "")
            if not folder:
                raise UsageError("--include takes a folder with TOML cards and recipe modules")
            folders.append(os.path.abspath(os.path.expanduser(folder)))
        else:
            left.append(word)
    if folders:
        before = filter(None, os.environ.get(INCLUDE, "").split(os.pathsep))
        os.environ[INCLUDE] = os.pathsep.join(dict.fromkeys([*folders, *before]))
    return left


_plain_format = warnings.formatwarning


def _told_in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, PluginWarning):
        return f"paperworks: {message}\n"
    return _plain_format(message, category, filename, lineno, line)


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
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER",
            help="Papers of your own: a folder with TOML cards and recipe modules. Stands anywhere, and may be given again."
            f"  [env: {INCLUDE}]",
        ),
    ] = None,
) -> None:
    pass
