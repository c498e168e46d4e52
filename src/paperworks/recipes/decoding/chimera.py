"""Chimera's draft network and Medusa's independent heads against plain decoding, on a real model."""

from __future__ import annotations

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run
from paperworks.recipes.decoding.drafting import COLUMNS, LARGE, TINY, Drafting, pit


@recipe(
    "chimera",
    baseline="plain decoding",
    gpu=7,
    columns=COLUMNS,
    tiny={**TINY, "ablations": True},
    large={**LARGE, "nodes": 23, "ablations": True},
)
def chimera(run: Run, work: Drafting = Drafting(), ablations: bool = False, seed: int = 0) -> None:
    """Chimera against plain decoding and Medusa's heads on the same prompts.

    Both are trained alike on text that the model writes itself, and decode held-out prompts greedily, turn by turn with
    plain decoding, transformers' own `generate` and its prompt look-up.

    Args:
        run: Keeps what is measured.
        work: Model, prompts and training.
        ablations: Train and measure Chimera without its trigrams, and without its context encoder, too.
        seed: Of text, order and weights.
    """
    names = ["Medusa", "Chimera", *(["Chimera, no trigrams", "Chimera, no context"] if ablations else [])]
    title = "Chimera: a draft network that sees every earlier token"
    pit(run, names, work, against="Medusa", title=title, seed=seed)
