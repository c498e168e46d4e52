"""Your own model: generate, train-drafter, inspect."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from paperworks.cli.shared import JsonOption, print_json, terminal


def generate(
    prompt: Annotated[str, typer.Argument(help="What you say to the model; - reads standard input.")],
    model: Annotated[str, typer.Option(help="A folder, a Hugging Face id or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="plain, or a drafter: medusa, hydra, hydra++ ...")] = "hydra",
    drafter: Annotated[Path | None, typer.Option(help="Folder of a saved drafter, instead of --method.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 for greedy text; as the model's generation config has it by default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is sampled.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Write text with a model, faster by a method: streams, and ends with tokens a second."""
    from paperworks.consult.writing import write
    from paperworks.lab.display import Display

    with Display() as display:
        written = write(
            sys.stdin.read() if prompt == "-" else prompt, model=model, method=method, drafter=drafter, chat=not raw,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            on_text=(lambda text: None) if as_json else lambda text: print(text, end="", flush=True), display=display,
        )  # fmt: skip
    cost = {"tokens": written.tokens, "seconds": written.seconds, "tokens_per_second": written.speed}
    if as_json:
        return print_json({"text": written.text, **cost, "accepted_per_call": written.accepted_per_call})
    print(
        f"\n{written.tokens} tokens in {written.seconds:.1f} s: {written.speed:.1f} tokens/s, "
        f"{written.accepted_per_call:.2f} a pass of the model",
        file=sys.stderr,
    )


def train_drafter(
    out: Annotated[Path, typer.Option(help="Folder for the drafter, new or empty.")],
    model: Annotated[str, typer.Option(help="A folder, a Hugging Face id or smollm2-135m.")] = "smollm2-135m",
    method: Annotated[str, typer.Option(help="hydra, medusa, chimera, fspad ...")] = "hydra",
    tokens: Annotated[
        int | None, typer.Option(help="Tokens the model writes to train it on.  [default: 24000]")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over them.  [default: 3]")] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="Draft only the most frequent tokens; 0 for all.  [default: 4096]")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Drafted tokens a call; what is fastest on this machine by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of text, order and weights.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Train a drafter for your own model on text that it writes: says how long it takes, goes on where it was stopped."""
    from paperworks.consult.training import train
    from paperworks.lab.display import Display

    with Display() as display:
        trained = train(
            out, method=method, model=model, tokens=tokens, epochs=epochs, vocabulary=vocabulary, nodes=nodes, seed=seed,
            display=display,
        )  # fmt: skip
    if as_json:
        return print_json({**vars(trained), "folder": str(trained.folder)})
    print(f"{trained.method}: {trained.folder}")
    if trained.nodes == 0:
        print("no drafting pays on this machine: with this drafter text is written as fast as without")
    print(f"next: {trained.command}")


def inspect_model(
    model: Annotated[str, typer.Option(help="FILE.py:NAME, package.module:NAME, or a transformers image classifier.")],
    data: Annotated[
        str, typer.Option(help="A table (.csv, .parquet, .npz), a folder of images, or a name such as digits.")
    ],
    layer: Annotated[str | None, typer.Option(help="The classifier's linear layer; the last one by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A safetensors file with the network's state.")] = None,
    figure: Annotated[Path, typer.Option(help="Folder to write the figures to.")] = Path(),
    batch_size: Annotated[int, typer.Option(min=1, help="Samples shown at once.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """What your own classifier or VAE has learnt: what is collapsed, how far, and what the theory says to change."""
    from paperworks.consult.inspection import batches, inspect, load_network

    network = load_network(model, weights=weights)
    found = inspect(network, batches(data, batch_size), layer=layer)
    figure.mkdir(parents=True, exist_ok=True)
    paths = {name: figure / f"{name}.png" for name in found.figures}
    for name, path in paths.items():
        found.figures[name].savefig(path, dpi=150)
    if as_json:
        findings = [vars(finding) for finding in found.findings]
        told = {"kind": found.kind, "layer": found.layer, "samples": found.samples, "findings": findings}
        return print_json({**told, "figures": {name: str(path) for name, path in paths.items()}})
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD, title=f"{found.kind}, {found.layer}, {found.samples} samples", title_justify="left"
    )
    for heading in ("figure", "value", "what it says"):
        table.add_column(heading, overflow="fold")
    for finding in found.findings:
        table.add_row(finding.name, f"{finding.value:.4g}", finding.says)
    terminal().print(table)
    for path in paths.values():
        print(f"figure: {path}")
