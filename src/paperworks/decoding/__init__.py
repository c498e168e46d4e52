"""Generate faster.

A method of this room is a `Drafter`, which proposes a `TokenTree`; an `Acceptance`, which decides what of a tree to keep;
or a decoder of its own. Drafters and acceptances go through one loop, `generate`, which also serves as transformers'
`model.generate(custom_generate=as_custom_generate(...))`.

What each keeps to: with `Greedy` or `Exact` acceptance any drafter gives exactly the target's law (its greedy text at
temperature 0), and a rejected branch leaves the key-value cache as it was.
"""

from paperworks.decoding.acceptance import Acceptance, Accepted, Exact, Greedy, Typical
from paperworks.decoding.cache import TreeCache
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.engine import Generation, Statistics, as_custom_generate, generate, stream
from paperworks.decoding.hydra import Hydra, Medusa
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.training import (
    DraftingData,
    collect,
    fit_tree,
    rank_accuracy,
    self_written,
    train_drafter,
)
from paperworks.decoding.tree import TokenTree, TreeShape

__all__ = [
    "Acceptance",
    "Accepted",
    "Committed",
    "Drafter",
    "DraftingData",
    "Exact",
    "Generation",
    "Greedy",
    "Hydra",
    "Medusa",
    "Sampling",
    "Statistics",
    "Target",
    "TokenTree",
    "TreeCache",
    "TreeShape",
    "Typical",
    "as_custom_generate",
    "collect",
    "fit_tree",
    "generate",
    "rank_accuracy",
    "self_written",
    "stream",
    "train_drafter",
]
