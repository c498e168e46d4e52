"""Hydra draft heads and Medusa's against plain decoding, on a real model."""

from __future__ import annotations

from typing import Literal

from paperworks.errors import UsageError
from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run
from paperworks.recipes.decoding.drafting import COLUMNS, LARGE, TINY, Drafting, pit


@recipe(
    "hydra",
    baseline="plain decoding",
    gpu=8,
    columns=COLUMNS,
    tiny={**TINY, "prefix_layer": True},
    large={**LARGE, "nodes": 63, "prefix_layer": True},
)
def hydra(
    run: Run,
    work: Drafting = Drafting(nodes=0),
    prefix_layer: bool = False,
    heads: Literal["trained", "shipped"] = "trained",
    seed: int = 0,
) -> None:
    """Hydra draft heads against plain decoding on the same prompts.

    Medusa heads and Hydra's are trained alike on text that the model writes itself, and decode held-out prompts
    greedily, turn by turn with plain decoding, transformers' own `generate` and its prompt look-up.

    Args:
        run: Keeps what is measured.
        work: Model, prompts and training.
        prefix_layer: Train and measure Hydra++ too, whose heads read through an attention layer.
        heads: Trained here, Medusa's beside them; or Hydra's alone that come with the package for smollm2-135m, which takes
            a minute or two.
        seed: Of text, order and weights.
    """
    title = "Hydra: draft heads that see what was drafted before them"
    if heads == "shipped":
        if prefix_layer:
            raise UsageError("Hydra++ does not come with the package: leave prefix_layer out, or train the heads")
        pit(run, ["Hydra"], work, against=None, title=title, seed=seed, ready=True)
        run.log(f"heads for your own model: paperworks train-drafter --model {work.model} --method hydra --out FOLDER")
        return
    names = ["Medusa", "Hydra", *(["Hydra++"] if prefix_layer else [])]
    pit(run, names, work, against="Medusa", title=title, seed=seed)
