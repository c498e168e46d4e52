"""The command line: list, search, show, run, compare, generate, results, bench, ingest, serve, digest."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from paperworks import __version__
from paperworks.errors import PaperworksError, UsageError
from paperworks.papers import ROOMS, Paper, get, load_cards

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StoreOption = Annotated[
    str | None,
    typer.Option(help="Where runs are kept: sqlite:///FILE or postgresql+psycopg://…  [env: PAPERWORKS_STORE]"),
]
_SHARED = {
    "scale": (str, "default", "tiny (seconds), default, or paper (a GPU's work)."),
    "seed": (int, 0, "Seed of all that is random."),
    "on": (str, "here", "here, ray, auto or ray://host:port."),
    "store": (Optional[str], None, "Where the run is kept; PAPERWORKS_STORE or the user's data folder by default."),
    "verbose": (bool, False, "Show where a failed run failed."),
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
    program.command("list", epilog="Example: `paperworks list --room decoding`")(list_papers)
    program.command("search", epilog='Example: `paperworks search "make my llm faster"`')(search_papers)
    program.command("show", epilog="Example: `paperworks show hydra`")(show)
    program.command(
        "compare",
        epilog="Example: `paperworks compare hydra chimera --new-tokens 64`",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(compare)
    program.command("generate", epilog='Example: `paperworks generate --method hydra "Why is the sky blue?"`')(generate)
    program.command("results", epilog="Example: `paperworks results hydra`")(results)
    program.command("inspect", epilog="Example: `paperworks inspect --model my_model.py:build --data digits`")(
        inspect_model
    )
    program.command("bench", epilog="Example: `paperworks bench hydra`")(bench)
    program.command("serve", epilog="Example: `paperworks serve --port 8000`")(serve)
    program.command("digest", epilog="Example: `paperworks digest --dry-run --to digests`")(digest)
    program.add_typer(_run_commands(), name="run")
    program.add_typer(_ingest_commands(), name="ingest")
    return program


def main() -> None:
    """Run the command line; errors are one sentence and an exit status."""
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False))


def _console() -> Any:
    from rich.console import Console

    return Console()


def list_papers(
    room: Annotated[str | None, typer.Option(help="Only this room.")] = None,
    status: Annotated[str | None, typer.Option(help="Only planned, runs or measured.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The papers, what works, and the newest figure of each."""
    from paperworks.lab import records

    if room is not None and room not in ROOMS:
        raise UsageError(f"there is no room {room!r}, only {', '.join(ROOMS)}")
    if status not in (None, "planned", "runs", "measured"):
        raise UsageError(f"there is no status {status!r}, only planned, runs and measured")
    papers = [
        paper
        for paper in load_cards().values()
        if room in (None, paper.room) and status in (None, records.status(paper))
    ]
    _print_papers(papers, as_json, by_room=True)


def _print_papers(papers: list[Paper], as_json: bool, *, by_room: bool = False) -> None:
    """The papers as a table, in their order with the whole first sentence of each, or one line each under their rooms."""
    from paperworks.lab import records

    room = None

    if as_json:
        return _print_json([{**paper.model_dump(), "status": records.status(paper)} for paper in papers])
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    console = _console()
    widest = max((len(paper.slug) for paper in papers), default=0)
    table.add_column("slug", no_wrap=True, min_width=widest)
    table.add_column("status", no_wrap=True, min_width=len("measured"))
    room_left = max(20, console.width - widest - len("measured") - 26) if by_room else None
    table.add_column("what it does", no_wrap=by_room, overflow="ellipsis", max_width=room_left)
    table.add_column("newest figure", overflow="fold", min_width=18)
    for paper in sorted(papers, key=lambda paper: list(ROOMS).index(paper.room)) if by_room else papers:
        if by_room and paper.room != room:
            table.add_section()
            table.add_row(f"[bold]{paper.room}[/bold]", "", f"[bold]{ROOMS[paper.room]}[/bold]", "")
        room = paper.room
        record = records.load_records().get(paper.slug)
        best = records.headline(record) if record else None
        newest = f"{best.name} {records.interval(best)}" if best else ""
        table.add_row(paper.slug, records.status(paper), paper.summary.split(". ")[0], newest)
    console.print(table)


def search_papers(
    query: Annotated[str, typer.Argument(help="What you are looking for, in plain words.")],
    limit: Annotated[int, typer.Option(min=1, help="How many to show.")] = 10,
    words: Annotated[bool, typer.Option("--words", help="By words only, at once.")] = False,
    embedder: Annotated[str | None, typer.Option(help="A sentence-transformers model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find papers by words and by meaning."""
    from paperworks.lab.search import search

    _print_papers(search(query, meaning=not words, embedder=embedder, limit=limit), as_json)


def show(
    paper: Annotated[str, typer.Argument(help="Slug, public name or arXiv number.")], as_json: JsonOption = False
) -> None:
    """A paper's card, its claims, how to import it, and the newest figures."""
    from paperworks.lab import records
    from paperworks.lab.report import claims, grid, tall

    card = get(paper)
    record = records.load_records().get(card.slug)
    if as_json:
        newest = record and {**record, "measurements": [m.__dict__ for m in record["measurements"]]}
        return _print_json({**card.model_dump(), "status": records.status(card), "record": newest})
    console = _console()
    console.print(f"[bold]{card.title}[/bold] ({card.year})", highlight=False)
    for line in (
        ", ".join(card.authors),
        card.url,
        card.code and f"{card.code} ({card.licence or 'licence not known'})",
    ):
        if line:
            console.print(line, highlight=False)
    console.print(f"\n{card.summary}\n", highlight=False)
    state = records.status(card)
    console.print(f"{state} · {card.room}: {ROOMS[card.room]} · {', '.join(card.tags)}", highlight=False)
    if state != "planned":
        console.print("\n".join(["", *card.imports, f"paperworks run {card.slug}"]), highlight=False)
    console.print("\n".join(["", *claims(card)]), highlight=False)
    if record:
        headings, rows = tall(*grid(record["measurements"]))
        from rich.table import Table

        table = Table(*headings, title="measured", title_justify="left", caption=records.machine(record["environment"]))
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if card.shortfall:
            console.print(f"Short of the claim: {card.shortfall}", highlight=False)


def _run_commands() -> typer.Typer:
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
        run = _execute(slug, options, as_json=as_json, **shared)
        return _report([run], as_json)

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


def _execute(slug: str, options: dict[str, Any], *, as_json: bool, verbose: bool, **shared: Any) -> Any:
    from paperworks.lab.executors import execute

    run = execute(slug, parameters=options, show_progress=not as_json, **shared)
    if run.status == "failed":
        if verbose and run.traceback:
            print(run.traceback, file=sys.stderr)
        hint = "" if verbose else f" (`paperworks results {run.id}` shows where)"
        print(f"paperworks: {slug} failed: {run.error}{hint}", file=sys.stderr)
    return run


def _report(runs: list[Any], as_json: bool) -> int:
    from paperworks.lab.report import results_table

    if as_json:
        _print_json([_as_json(run) for run in runs] if len(runs) > 1 else _as_json(runs[0]))
    else:
        for run in runs:
            if run.measurements:
                _console().print(results_table(run, get(run.paper)))
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
    papers: Annotated[list[str], typer.Argument(help="Papers of one room, then options that go to each recipe.")],
    scale: Annotated[str, typer.Option(help=_SHARED["scale"][2])] = "default",
    seed: Annotated[int, typer.Option(help=_SHARED["seed"][2])] = 0,
    on: Annotated[str, typer.Option(help=_SHARED["on"][2])] = "here",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> int:
    """Run several papers on the same work, side by side: one table, one figure."""
    from paperworks.lab.compare import side_by_side
    from paperworks.lab.recipe import find

    words = [*papers, *context.args]
    first = next((index for index, word in enumerate(words) if word.startswith("--")), len(words))
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
        _execute(card.slug, options, scale=scale, seed=seed, on=on, store=store, as_json=as_json, verbose=False)
        for card in cards
    ]
    if as_json:
        return _report(runs, True)
    table, figure = side_by_side(runs)
    _console().print(table)
    if figure:
        print(f"figure: {figure}")
    return max(0 if run.status == "finished" else 1 for run in runs)


def generate(
    prompt: Annotated[str, typer.Argument(help="What you say to the model; - reads standard input.")],
    model: Annotated[str, typer.Option(help="A folder, a Hugging Face id or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="plain, or a drafter: medusa, hydra, hydra++ ...")] = "hydra",
    drafter: Annotated[Path | None, typer.Option(help="Folder of a saved drafter, instead of --method.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 for greedy text.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is sampled.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write text with a model, faster by a method: streams, and ends with tokens a second."""
    from paperworks.lab.run import Display
    from paperworks.lab.writing import write

    written = write(
        sys.stdin.read() if prompt == "-" else prompt, model=model, method=method, drafter=drafter, chat=not raw,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        on_text=(lambda text: None) if as_json else lambda text: print(text, end="", flush=True),
        display=Display() if sys.stderr.isatty() and not as_json else None,
    )  # fmt: skip
    cost = {"tokens": written.tokens, "seconds": written.seconds, "tokens_per_second": written.speed}
    if as_json:
        return _print_json({"text": written.text, **cost, "accepted_per_call": written.accepted_per_call})
    print(
        f"\n{written.tokens} tokens in {written.seconds:.1f} s: {written.speed:.1f} tokens/s, "
        f"{written.accepted_per_call:.2f} a pass of the model",
        file=sys.stderr,
    )


def inspect_model(
    model: Annotated[str, typer.Option(help="FILE.py:NAME, package.module:NAME, or a transformers image classifier.")],
    data: Annotated[str, typer.Option(help="Data to show it, such as digits or mnist-10k.")],
    layer: Annotated[str | None, typer.Option(help="The classifier's linear layer; the last one by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A safetensors file with the network's state.")] = None,
    figure: Annotated[Path, typer.Option(help="Folder to write the figures to.")] = Path(),
    batch_size: Annotated[int, typer.Option(min=1, help="Samples shown at once.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """What your own classifier or VAE has learnt: what is collapsed, how far, and what the theory says to change."""
    from paperworks.lab.inspection import batches, inspect, load_network

    network = load_network(model, weights=weights)
    found = inspect(network, batches(data, batch_size), layer=layer)
    figure.mkdir(parents=True, exist_ok=True)
    paths = {name: figure / f"{name}.png" for name in found.figures}
    for name, path in paths.items():
        found.figures[name].savefig(path, dpi=150)
    if as_json:
        findings = [vars(finding) for finding in found.findings]
        told = {"kind": found.kind, "layer": found.layer, "samples": found.samples, "findings": findings}
        return _print_json({**told, "figures": {name: str(path) for name, path in paths.items()}})
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, title=f"{found.kind}, {found.layer}, {found.samples} samples", title_justify="left"
    )
    for heading in ("figure", "value", "what it says"):
        table.add_column(heading, overflow="fold")
    for finding in found.findings:
        table.add_row(finding.name, f"{finding.value:.4g}", finding.says)
    _console().print(table)
    for path in paths.values():
        print(f"figure: {path}")


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
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the newest finished run as Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What was measured here."""
    from rich import box
    from rich.table import Table

    from paperworks.lab import report
    from paperworks.lab.records import interval
    from paperworks.lab.store import Store

    with Store(store) as opened:
        if what is not None and what[:8].isdigit() and "-" in what:
            run = opened.run(what)
            _report([run], as_json)
            if not as_json:
                for log in run.logs:
                    print(log.message)
                if run.traceback:
                    print(run.traceback)
            return
        paper = get(what) if what is not None else None
        runs = opened.runs(paper.slug if paper else None, limit=limit)
    if as_json:
        return _print_json([_as_json(run) for run in runs])
    if not runs:
        print(f"nothing was measured here yet: `paperworks run {paper.slug if paper else 'hydra'}` does it")
        return
    if markdown:
        newest = next((run for run in runs if run.status == "finished"), None)
        if newest is None:
            raise UsageError("no run has finished yet, so there is nothing to print as Markdown")
        print(report.markdown(newest, get(newest.paper)))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("run", "paper", "scale", "status", "ratios"):
        table.add_column(heading, no_wrap=heading == "run", overflow="fold")
    for run in runs:
        ratios = "\n".join(f"{m.series or ''} {m.name} {interval(m)}" for m in run.measurements if m.against)
        table.add_row(
            run.id, run.paper, run.scale, run.status if not run.error else f"{run.status}: {run.error}", ratios
        )
    _console().print(table)


SinceOption = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d"], help="From this day; where the last ingest ended, or a week ago, by default."),
]
UntilOption = Annotated[
    datetime | None, typer.Option(formats=["%Y-%m-%d"], help="To the beginning of this day; now by default.")
]
WordsOption = Annotated[bool, typer.Option("--words", help="Do not embed the papers, for search by words only.")]


def _ingest_commands() -> typer.Typer:
    example = "Example: `paperworks ingest arxiv --category cs.LG --since 2026-11-01`"
    group = typer.Typer(
        help="Take papers into the page's index; stopped, the same command goes on where it was.",
        no_args_is_help=True,
        epilog=example,
        rich_markup_mode="markdown",
    )
    group.command("arxiv", epilog=example)(ingest_arxiv)
    group.command("daily-papers", epilog="Example: `paperworks ingest daily-papers --since 2026-11-01`")(ingest_daily)
    group.command("cards", epilog="Example: `paperworks ingest cards --abstracts`")(ingest_cards)
    return group


def ingest_arxiv(
    category: Annotated[str, typer.Option(help="arXiv category, such as cs.LG.")],
    since: SinceOption = None,
    until: UntilOption = None,
    url: Annotated[str | None, typer.Option(help="arXiv's API, where it is not at arxiv.org.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Papers of a category of arXiv: those submitted, and those revised since the last time."""
    from paperworks.page import ingest

    api = ingest.Arxiv(url) if url else ingest.Arxiv()
    days = {"since": _in_utc(since), "until": _in_utc(until)}
    _ingest(
        lambda index, opened, progress: ingest.ingest_arxiv(
            index, opened, category, source=api, progress=progress, **days
        ),
        store, words, as_json,
    )  # fmt: skip


def ingest_daily(
    since: SinceOption = None,
    until: UntilOption = None,
    url: Annotated[str | None, typer.Option(help="The Hub, where it is not at huggingface.co.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hugging Face's daily papers, with their upvotes."""
    from paperworks.page import ingest

    days = {"since": _in_utc(since), "until": _in_utc(until)}
    _ingest(
        lambda index, opened, progress: ingest.ingest_daily_papers(
            index, opened, source=ingest.DailyPapers(url), progress=progress, **days
        ),
        store, words, as_json,
    )  # fmt: skip


def ingest_cards(
    abstracts: Annotated[bool, typer.Option("--abstracts", help="Ask arXiv for their abstracts and authors.")] = False,
    url: Annotated[str | None, typer.Option(help="arXiv's API, where it is not at arxiv.org.")] = None,
    words: WordsOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """The cards, which are what runs here."""
    from paperworks.page import ingest

    api = ingest.Arxiv(url) if url else ingest.Arxiv()
    _ingest(
        lambda index, opened, progress: ingest.ingest_cards(index, abstracts=abstracts, source=api),
        store, words, as_json,
    )  # fmt: skip


def _ingest(read: Callable[..., Any], store: str | None, words: bool, as_json: bool) -> None:
    """Read a source into the index, embed what is new, and say what came."""
    from paperworks.lab.store import Store
    from paperworks.page.index import Index

    with Store(store) as opened, _progress(hidden=as_json) as tell:
        index = Index(opened)
        came = read(index, opened, partial(tell, "reading"))
        embedded = 0 if words else index.build(partial(tell, "embedding"))
        held = index.search("", limit=1).total
    told = {"read": came.read, "new": came.new, "updated": came.updated, "embedded": embedded, "held": held}
    if as_json:
        return _print_json(told)
    print(f"{came.read} papers read: {came.new} new, {came.updated} updated; the index holds {held}")


def _in_utc(day: datetime | None) -> datetime | None:
    return day and day.replace(tzinfo=UTC)


def bench(
    papers: Annotated[list[str] | None, typer.Argument(help="Papers; all that have a recipe by default.")] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only papers without a record, to go on after a stop.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="The page instead: search over 100,000 papers, 200 readers at once.")
    ] = False,
    store: StoreOption = None,
) -> int:
    """Run recipes at their default scale and write `benchmarks/` in this checkout."""
    from paperworks.lab import records
    from paperworks.lab.recipe import recipes

    root = records.checkout()
    if root is None:
        raise UsageError("records are written into a checkout of Paperworks: clone it and `make bench` there")
    if page:
        return _bench_page(root)
    slugs = [get(name).slug for name in papers] if papers else list(recipes())
    if missing:
        slugs = [slug for slug in slugs if slug not in records.load_records()]
    worst = 0
    for slug in slugs:
        run = _execute(slug, {}, as_json=False, verbose=True, store=store)
        worst = max(worst, _report([run], False))
        if run.status == "finished":
            print(f"record: {records.write_record(run, root)}")
    return worst


def _bench_page(root: Path) -> int:
    from paperworks.page.bench import page_bench

    with _progress() as tell:
        page_bench(root, progress=tell)
    print(f"record: {root / 'benchmarks' / 'page.json'}")
    return 0


@contextmanager
def _progress(*, hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
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


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at; this machine only by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    base_url: Annotated[
        str | None, typer.Option(help="Address by which readers come, such as https://papers.example.org.")
    ] = None,
    allow_runs: Annotated[
        bool, typer.Option("--allow-runs", help="Let readers start runs without logging in.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Server processes that share the work.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Runs that may take place at once.")] = 1,
    store: StoreOption = None,
) -> None:
    """The page: search, trending, subscriptions, and a run button for every paper."""
    from paperworks.page.app import serve as serve_page

    serve_page(
        host=host, port=port, base_url=base_url, processes=processes, allow_runs=allow_runs, workers=workers,
        store_url=store,
    )  # fmt: skip


def digest(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the digests as HTML and text, send nothing, change nothing.")
    ] = False,
    to: Annotated[Path, typer.Option(help="Folder to write them into.")] = Path("digests"),
    base_url: Annotated[
        str, typer.Option(help="Address by which readers come, such as https://papers.example.org.")
    ] = "http://127.0.0.1:8000",
    store: StoreOption = None,
) -> None:
    """The e-mail of new and trending papers, to those whose subscription is due; for a daily or hourly timer.

    Mails go through the server of PAPERWORKS_SMTP=smtp://user:password@host:port?from=papers@example.org.
    """
    import os

    from paperworks.lab.store import Store
    from paperworks.page.digest import put_digests, write_digests
    from paperworks.page.index import Index
    from paperworks.page.mail import send_pending

    smtp = os.environ.get("PAPERWORKS_SMTP")
    if not (smtp or dry_run):
        raise UsageError("PAPERWORKS_SMTP names no mail server; set it, or write files instead: --dry-run --to FOLDER")
    with Store(store) as opened:
        Index(opened).sync_cards()
        now = datetime.now(UTC)
        if dry_run:
            for path in write_digests(opened, base_url, now, to):
                print(path)
            return
        made = put_digests(opened, base_url, now)
        sent = send_pending(opened, str(smtp))
    print(f"{made} digests made, {sent.sent} mails sent, {sent.failed} failed")
