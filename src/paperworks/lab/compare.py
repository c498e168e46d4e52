"""Several runs of one room side by side: one table, one figure."""

from __future__ import annotations

from pathlib import Path

from paperworks.lab.recipe import recipes
from paperworks.lab.report import Grid, grid
from paperworks.lab.run import Measurement, Run


def _row(run: Run, measurement: Measurement) -> str:
    name = f"{run.paper} (tiny)" if run.scale == "tiny" else run.paper
    return f"{name}: {measurement.series or ''}".rstrip(": ")


def side_by_side(runs: list[Run]) -> tuple[Grid, Path | None]:
    """What all runs measured in one grid, rows named after their paper, and a figure of their ratios.

    Of what they have in common the columns of their recipes' tables are shown. What only some of them measured is in their
    own tables; where they have nothing in common, all is shown.

    Args:
        runs: Runs of different papers, made on the same work.

    Returns:
        Headings and rows, and the figure's path where a ratio was measured. Rows and bars of scale tiny bear that name.
    """
    measured = [Measurement(**{**m.__dict__, "series": _row(run, m)}) for run in runs for m in run.measurements]
    common = set.intersection(*({(m.name, m.against) for m in run.measurements} for run in runs))
    named = {column for run in runs if (found := recipes().get(run.paper)) for column in found.columns}
    shared = [m for m in measured if (m.name, m.against) in common]
    told = [m for m in shared if {m.name, f"{m.name} against {m.against}"} & named]
    headings, rows = grid(told or shared or measured)
    ratios = [m for m in measured if m.against and m.name == next((r.name for r in measured if r.against), None)]
    if not ratios:
        return (headings, rows), None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.4 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    for place, ratio in enumerate(reversed(ratios)):
        low, high = ratio.ends
        axes.barh(place, ratio.value, color="#1f6f8b", xerr=[[ratio.value - low], [high - ratio.value]], capsize=3)
    axes.set_yticks(range(len(ratios)), [ratio.series or "" for ratio in reversed(ratios)])
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlabel(f"{ratios[0].name} against {ratios[0].against}")
    axes.spines[["top", "right"]].set_visible(False)
    path = runs[0].artefact_folder.parent / f"compare-{'-'.join(run.paper for run in runs)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return (headings, rows), path
