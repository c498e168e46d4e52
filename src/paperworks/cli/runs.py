"""Recipes: run, compare, results, bench."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Optional

import typer

from paperworks.cli.shared import JsonOption, StoreOption, print_json, terminal
from paperworks.errors import UsageError
from paperworks.papers import get, load_cards

_SHARED = {
    "scale": (str, "default", "tiny (seconds), default, or paper (a GPU's work)."),
    "seed": (int, 0, "Seed of all that is random."),
    "on": (str, "here", "here, ray, auto or ray://host:port."),
    "store": (Optional[str], None, "Where the run is kept; PAPERWORKS_STORE or the user's data folder by default."),
    "verbose": (bool, False, "Show where a failed run failed."),
}


def run_commands() -> typer.Typer:
    """`run`, with a command for every recipe."""
    from paperworks.lab.recipe import find, recipes

    class Group(typer.core.TyperGroup):
        """An unknown paper gets the lab's own sentence, which names the nearest."""

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args and args[0] not in self.commands and not args[0].startswith("-"):
                slug = get(args[0]).slug
                find(slug)
                args = [slug, *args[1:]]
            return super().resolve_command(ctx, args)

    group = typer.Typer(
        cls=Group,
        help="Run a paper's recipe: progress, table, figure, record.",
        no_args_is_help=True,
        epilog="Example: `paperworks run hydra --new-tokens 64 --scale tiny`",
        rich_markup_mode="markdown",
    )
    for slug, recipe in recipes().items():
        group.command(slug, help=recipe.summary, epilog=f"Example: `paperworks run {slug} --scale tiny`")(
            _run_command(slug)
        )
    return group


def _run_command(slug: str) -> Callable[..., int]:
    """The command of one recipe: its parameters become options, set only where the user gives them."""
    from paperworks.lab.recipe import find

    recipe = find(slug)

    def command(**given: Any) -> int:
        shared = {name: given.pop(name) for name in _SHARED}
        as_json = given.pop("as_json")
        options = {name: value for name, value in given.items() if value is not None}
        run = execute(slug, options, as_json=as_json, **shared)
        return report([run], as_json)

    parameters: list[tuple[str, Any, Any]] = []
    for name, parameter in recipe.parameters.items():
        option = typer.Option(help=parameter.help, show_default=str(parameter.default))
        parameters.append((name, Annotated[parameter.type | None, option], None))
    for name, (kind, default, text) in _SHARED.items():
        flag = ["--verbose"] if kind is bool else []
        parameters.append((name, Annotated[kind, typer.Option(*flag, help=text)], default))
    parameters.append(("as_json", JsonOption, False))
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, kind, default in parameters]
    )
    command.__annotations__ = {name: kind for name, kind, _ in parameters}
    return command


def execute(recipe: Any, options: dict[str, Any], *, as_json: bool, verbose: bool, **shared: Any) -> Any:
    """Execute a recipe, given as such or by its paper's slug, and say in a sentence where it failed."""
    from paperworks.lab import executors

    run = executors.execute(recipe, parameters=options, **shared)
    if run.status == "failed":
        if verbose and run.traceback:
            print(run.traceback, file=sys.stderr)
        hint = "" if verbose else f" (`paperworks results {run.id}` shows where)"
        print(f"paperworks: {run.paper} failed: {run.error}{hint}", file=sys.stderr)
    return run


def report(runs: list[Any], as_json: bool, *, every: bool = False) -> int:
    """Print what runs measured, and give the exit status: that of the worst."""
    from paperworks.lab.benchmarks import every_figure
    from paperworks.lab.recipe import comparisons
    from paperworks.lab.records import as_record
    from paperworks.lab.report import print_comparison, print_results, rendered

    if as_json:
        print_json([_as_json(run) for run in runs] if len(runs) > 1 else _as_json(runs[0]))
    else:
        console = terminal()
        for run in runs:
            card = load_cards().get(run.paper)
            if run.measurements and card is not None:
                # A record tells no folders of this machine; who typed them wants them back.
                kept = {"measurements": run.measurements, "parameters": run.parameters}
                print_results(console, card, as_record(run) | kept)
            elif run.measurements and run.paper in comparisons():
                print_comparison(console, as_record(run) | {"measurements": run.measurements})
            elif run.measurements:
                print(f"who brought {run.paper} is not here any more: these are its figures, without a card and claims")
            if (every or (card is None and run.paper not in comparisons())) and run.measurements:
                console.print()
                console.print(rendered(*every_figure(run.measurements), console.width), highlight=False)
            for path in run.artefacts.values():
                print(f"{'figure' if path.suffix == '.png' else path.name}: {path}")
            if run.finished:
                print(f"run {run.id}: {run.status} in {(run.finished - run.started).total_seconds():.0f} s")
    return max(0 if run.status == "finished" else getattr(run.exception, "exit_status", 1) for run in runs)


def _as_json(run: Any) -> dict[str, Any]:
    from paperworks.lab.records import as_record

    return {
        "id": run.id, **as_record(run), "error": run.error,
        "artefacts": {name: str(path) for name, path in run.artefacts.items()},
    }  # fmt: skip


def compare(
    context: typer.Context,
    papers: Annotated[
        list[str] | None, typer.Argument(help="Papers of one room, then options that go to each recipe.")
    ] = None,
    room: Annotated[
        str | None,
        typer.Option(help="A room instead: its methods and what one would otherwise take, on the same work."),
    ] = None,
    scale: Annotated[str, typer.Option(help=_SHARED["scale"][2])] = "default",
    seed: Annotated[int, typer.Option(help=_SHARED["seed"][2])] = 0,
    on: Annotated[str, typer.Option(help=_SHARED["on"][2])] = "here",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> int:
    """Run several papers on the same work, side by side: one table, one figure."""
    from paperworks.lab.compare import side_by_side
    from paperworks.lab.recipe import find
    from paperworks.lab.report import rendered
    from paperworks.lab.verdicts import TINY

    words = [*(papers or ()), *context.args]
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
    if room is not None:
        if words[:first]:
            raise UsageError(f"compare takes papers or a room, not both: got {words[0]} and --room {room}")
        return _compare_room(room, _pairs(words[first:]), scale, seed, on, store, as_json)
    cards = [get(name) for name in words[:first]]
    options = _pairs(words[first:])
    if len({card.slug for card in cards}) < 2:
        raise UsageError("compare takes at least two different papers, such as `paperworks compare hydra chimera`")
    if len({card.room for card in cards}) > 1:
        told = ", ".join(f"{card.slug} ({card.room})" for card in cards)
        raise UsageError(f"only papers of one room do the same work, but these are of several: {told}")
    for card in cards:
        find(card.slug).parse(options)
    runs = [
        execute(card.slug, options, scale=scale, seed=seed, on=on, store=store, as_json=as_json, verbose=False)
        for card in cards
    ]
    if as_json:
        return report(runs, True)
    (headings, rows), figure = side_by_side(runs)
    console = terminal()
    console.print(rendered(headings, rows, console.width), highlight=False)
    if scale == "tiny":
        print(f"\n{TINY.capitalize()}.")
    if figure:
        print(f"figure: {figure}")
    return max(0 if run.status == "finished" else 1 for run in runs)


def _compare_room(
    room: str, options: dict[str, str], scale: str, seed: int, on: str, store: str | None, as_json: bool
) -> int:
    from paperworks.lab.recipe import comparisons

    known = comparisons()
    if room not in known:
        raise UsageError(f"there is no comparison of a room {room!r}: there is one of {', '.join(sorted(known))}")
    run = execute(known[room], options, scale=scale, seed=seed, on=on, store=store, as_json=as_json, verbose=False)
    return report([run], as_json)


def _pairs(words: list[str]) -> dict[str, str]:
    """`--new-tokens 64 --model=x` as a dictionary."""
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise UsageError(f"expected an option such as --new-tokens 64, got {word!r}")
        options[name.replace("-", "_")] = value if equals else next(rest, "")
    return options


def results(
    what: Annotated[str | None, typer.Argument(help="A paper, or the id of a run to see it whole.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many runs to show.")] = 20,
    store: StoreOption = None,
    every: Annotated[bool, typer.Option("--all", help="Every figure of the run, a line each.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the newest finished run as Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What was measured here."""
    from rich import box
    from rich.table import Table

    from paperworks.lab.records import interval
    from paperworks.lab.report import markdown as as_markdown
    from paperworks.lab.store import Store
    from paperworks.lab.verdicts import TINY

    with Store(store) as opened:
        if what is not None and what[:8].isdigit() and "-" in what:
            run = opened.run(what)
            report([run], as_json, every=every)
            if not as_json:
                for log in run.logs:
                    print(log.message)
                if run.traceback:
                    print(run.traceback)
            return
        paper = get(what) if what is not None else None
        runs = opened.runs(paper.slug if paper else None, limit=1 if every else limit)
    if as_json:
        return print_json([_as_json(run) for run in runs])
    if not runs:
        print(f"nothing was measured here yet: `paperworks run {paper.slug if paper else 'hydra'}` does it")
        return
    if every:
        report(runs, False, every=True)
        return
    if markdown:
        finished = [run for run in runs if run.status == "finished"]
        newest = next((run for run in finished if run.scale != "tiny"), next(iter(finished), None))
        if newest is None:
            raise UsageError("no run has finished yet, so there is nothing to print as Markdown")
        print(as_markdown(newest, get(newest.paper)))
        if newest.scale == "tiny":
            print(f"{TINY.capitalize()}.")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "paper", "scale", "status", "ratios"):
        table.add_column(heading, no_wrap=heading == "run", overflow="fold")
    for run in runs:
        ratios = "\n".join(f"{m.series or ''} {m.name} {interval(m)}" for m in run.measurements if m.against)
        state = run.status if not run.error else f"{run.status}: {run.error}"
        # What a tiny run gives is no figure to take away.
        style = "dim" if run.scale == "tiny" else None
        if run.scale == "tiny" and ratios:
            ratios = f"no figures, only a trial:\n{ratios}"
        table.add_row(run.id, run.paper, run.scale, state, ratios, style=style)
    terminal().print(table)
    if any(run.scale == "tiny" for run in runs):
        print(f"{TINY.capitalize()}.")
