"""`bench`: recipes run for the committed records."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from paperworks.cli.runs import execute, report
from paperworks.cli.shared import StoreOption
from paperworks.errors import UsageError
from paperworks.papers import get, load_cards

# What may be carried to a machine with a GPU.
_MOST_PARTS = 60 * 2**20
# With less a recipe would hardly have loaded its model.
_LEAST_SHARE = 3.0


def bench(
    papers: Annotated[list[str] | None, typer.Argument(help="Papers; all that have a recipe by default.")] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only papers without a record, to go on after a stop.")
    ] = False,
    scale: Annotated[str, typer.Option(help="tiny (to try it, with --out), default or paper.")] = "default",
    device: Annotated[
        Literal["any", "cpu", "cuda"],
        typer.Option(help="cpu leaves a GPU alone, cuda wants one; any takes what is there."),
    ] = "any",
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="Only what a GPU changes, most first, each within its share of so many minutes."),
    ] = None,
    parts: Annotated[
        Path | None, typer.Option(help="Trained parts that were brought along, as --pack leaves them.")
    ] = None,
    pack: Annotated[
        Path | None, typer.Option(help="Copy the trained parts that were used there, as many as 60 MiB hold.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where benchmarks/ is written; this checkout by default.")] = None,
    page: Annotated[
        bool, typer.Option("--page", help="The page instead: search over 100,000 papers, 200 readers at once.")
    ] = False,
    store: StoreOption = None,
) -> int:
    """Run recipes and write `benchmarks/` in this checkout: a record a paper and device, each as it is made."""
    from paperworks.lab import benchmarks, budget, cache, records
    from paperworks.lab.recipe import find, recipes

    root = out or records.checkout()
    if root is None:
        raise UsageError(
            "records are written into a checkout of Paperworks: clone it and `make bench` there, or give --out"
        )
    if out is None and scale == "tiny":
        raise UsageError("runs of scale tiny are no benchmarks: give --out FOLDER to try it")
    if page:
        return _bench_page(root)
    _choose(device)
    if parts is not None:
        if not parts.is_dir():
            raise UsageError(f"{parts} is no folder of trained parts, as `paperworks bench --pack FOLDER` leaves one")
        os.environ[cache.BROUGHT] = str(parts)
    if papers:
        chosen = [find(get(name).slug) for name in papers]
    else:
        # What a plugin measures belongs beside its own card, and is asked for by name.
        cards = load_cards()
        chosen = [one for slug, one in recipes().items() if not cards[slug].origin]
    if missing:
        chosen = [one for one in chosen if one.paper not in records.load_records(root / "benchmarks" / "records")]
    left_out = [] if minutes is None else [f"{one.paper}: a GPU changes nothing" for one in chosen if not one.gpu]
    turns = budget.shares(budget.in_order(chosen), 60 * minutes) if minutes else ((one, None) for one in chosen)
    statuses: list[int] = []
    with cache.folders_used() as used:
        for one, seconds in turns:
            if scale not in one.scales:
                left_out.append(f"{one.paper}: it has no scale {scale}, only {', '.join(one.scales)}")
                continue
            if seconds is not None and seconds < _LEAST_SHARE:
                left_out.append(f"{one.paper}: no time was left")
                continue
            reason = f"its share of {seconds:.0f} s was over" if seconds else ""

            def work(over: Callable[[], bool], slug: str = one.paper, reason: str = reason) -> None:
                run = execute(
                    slug, {}, as_json=False, verbose=True, scale=scale, store=store,
                    stopped=lambda: reason if over() else "",
                )  # fmt: skip
                statuses.append(report([run], False))
                if run.status == "finished":
                    print(f"record: {benchmarks.write_record(run, root)}", flush=True)
                else:
                    left_out.append(f"{slug}: {run.error}")

            if seconds is None:
                work(lambda: False)
            elif not budget.within(seconds, work):
                left_out.append(f"{one.paper}: {reason}")
    if pack is not None:
        # What the model wrote is only there to train on.
        kept = [folder for folder in used if folder.parent.name != "drafting-data"]
        packed = cache.pack(kept, pack, most=_MOST_PARTS)
        sizes = {folder: cache.size_of(folder) / 2**20 for folder in packed}
        print(f"parts: {pack}, {sum(sizes[folder] for folder, there in packed.items() if there):.1f} MiB")
        left_out += [
            f"{folder.parent.name}/{folder.name}: its {sizes[folder]:.1f} MiB have no room in {pack}"
            for folder, there in packed.items()
            if not there
        ]
    for line in left_out:
        print(f"left out: {line}")
    return max(statuses, default=0)


def _choose(device: str) -> None:
    """Hide the GPU from what is run, or make sure that there is one."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("PyTorch sees no GPU here: run with --device cpu, or install a build of it for the GPU")


def _bench_page(root: Path) -> int:
    from paperworks.lab.display import Display
    from paperworks.page.bench import page_bench

    with Display() as display:
        page_bench(root, progress=display.tell)
    print(f"record: {root / 'benchmarks' / 'page.json'}")
    return 0
