"""A drafter for one's own model, trained on text that the model writes: what `paperworks train-drafter` does."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.display import Display
from paperworks.lab.run import Run


@dataclass(frozen=True)
class TrainedDrafter:
    """A drafter that was trained and saved.

    Attributes:
        method: Its name.
        folder: Where it lies, whole.
        nodes: Drafted tokens a call; 0 where no drafting pays on this machine, None where it differs from call to call.
        command: The command that writes text with it.
    """

    method: str
    folder: Path
    nodes: int | None
    command: str


def train(
    out: Path,
    *,
    method: str = "hydra",
    model: str = "smollm2-135m",
    tokens: int | None = None,
    epochs: float | None = None,
    vocabulary: int | None = None,
    nodes: int | None = None,
    seed: int = 0,
    display: Display | None = None,
) -> TrainedDrafter:
    """Train a drafter for a model and save it in a folder of its own.

    The model writes its training text in parts, and each is kept: a training that was stopped goes on behind the last
    part, and one with more tokens begins with the parts of one with fewer. Behind the first new part it is said how long
    all will take.

    Args:
        out: The folder, new or empty.
        method: A drafter of `paperworks.recipes.decoding.drafting.DRAFTERS`, in any case.
        model: Name of the model.
        tokens: Tokens that the model writes to train it on; as the recipe has it by default, and so are the next two.
        epochs: Passes over them.
        vocabulary: Draft only the most frequent tokens, so many; 0 drafts all.
        nodes: Drafted tokens a call; by default as many as give the most tokens a second on this machine.
        seed: Of text, order and weights.
        display: Shows progress.

    Raises:
        UsageError: There is no such method or model, it cannot draft for it, a value is out of range, or the folder holds
            something already.
    """
    from paperworks.recipes.decoding.drafting import (
        Drafting,
        cpu_friendly_dtype,
        drafter_named,
        load_target,
        refusals,
        trained,
    )

    name, work = drafter_named(method), Drafting()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} holds something already: give the drafter a folder of its own by --out")
    tokens = work.train_tokens if tokens is None else tokens
    epochs = work.epochs if epochs is None else epochs
    vocabulary = work.draft_vocabulary if vocabulary is None else vocabulary
    for what, value, least in (
        ("tokens", tokens, 200),
        ("vocabulary", vocabulary, 0),
        ("nodes", 1 if nodes is None else nodes, 1),
    ):
        if value < least:
            raise UsageError(f"{what} takes a whole number of at least {least}, not {value}")
    if not epochs > 0:
        raise UsageError(f"epochs takes a number above 0, not {epochs}")
    target, tokenizer = load_target(model, dtype=cpu_friendly_dtype())
    with refusals():
        drafter = trained(
            Run("hydra", display=display), name, target, tokenizer, model=model, tokens=tokens, epochs=epochs,
            vocabulary=vocabulary, nodes=nodes, seed=seed,
        )  # fmt: skip
        drafter.save_pretrained(out)
    tree: Any = getattr(drafter, "tree", None)
    found = len(tree) - 1 if hasattr(tree, "paths") else getattr(drafter, "nodes", None)
    command = shlex.join(["paperworks", "generate", "--model", model, "--drafter", str(out), "Why is the sky blue?"])
    return TrainedDrafter(name, out, found, command)
