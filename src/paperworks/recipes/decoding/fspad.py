"""FSPAD and EAGLE-2, its baseline, against plain decoding on a real model."""

from __future__ import annotations

from paperworks.lab.recipe import recipe
from paperworks.lab.run import Run
from paperworks.recipes.decoding.drafting import COLUMNS, LARGE, TINY, Drafting, pit

_ABLATIONS = ("EAGLE-2, feature sampling", "EAGLE-2, partial alignment", "EAGLE-2, two layers")


@recipe(
    "fspad",
    baseline="plain decoding",
    gpu=7,
    columns=COLUMNS,
    tiny={**TINY, "ablations": True},
    large={**LARGE, "nodes": 60, "ablations": True},
)
def fspad(run: Run, work: Drafting = Drafting(), ablations: bool = False, seed: int = 0) -> None:
    """FSPAD against plain decoding and EAGLE-2 on the same prompts.

    Both are trained alike on text that the model writes itself, and decode held-out prompts greedily, turn by turn with
    plain decoding, transformers' own `generate` and its prompt look-up.

    Args:
        run: Keeps what is measured.
        work: Model, prompts and training.
        ablations: Also train each of FSPAD's two parts alone, and EAGLE-2 with a second layer, which has about as many
            weights as FSPAD.
        seed: Of text, order and weights.
    """
    names = ["EAGLE-2", *(_ABLATIONS if ablations else ()), "FSPAD"]
    title = "FSPAD: features of the token that was sampled, logits freed from them"
    pit(run, names, work, against="EAGLE-2", title=title, seed=seed)
