"""What passes and drafts cost on this machine, and which tree then gives the most tokens a second."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from paperworks import __version__, processor
from paperworks.decoding.cache import TreeCache
from paperworks.decoding.identity import weights_digest
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree, TreeShape

if TYPE_CHECKING:
    from paperworks.decoding.drafter import Drafter

# Tokens in a pass of which the cost is measured, behind a text of so many.
_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_TEXT = 64
# Sizes of trees that are tried.
_NODES = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 63)


@dataclass(frozen=True)
class PassCosts:
    """What a pass over n tokens costs in passes over one: as measured, and in straight lines between and beyond.

    Args:
        ratios: Cost by number of tokens. A pass over one costs 1, and none less than a shorter one.

    Raises:
        ValueError: fewer than two sizes, or a cost that is not positive.

    Example:
        >>> costs = PassCosts({1: 1.0, 4: 1.3, 8: 1.7})
        >>> costs(1), costs(4), round(costs(6), 2), round(costs(12), 2)
        (1.0, 1.3, 1.5, 2.1)
    """

    ratios: Mapping[int, float]

    def __post_init__(self) -> None:
        if len(self.ratios) < 2 or min(self.ratios) != 1 or min(self.ratios.values()) <= 0:
            raise ValueError(
                f"costs are positive, of a pass over 1 token and of some over more, got {dict(self.ratios)}"
            )
        most, risen = 0.0, {}
        for tokens, cost in sorted(self.ratios.items()):
            # What is measured wavers.
            risen[tokens] = most = max(most, cost / self.ratios[1])
        object.__setattr__(self, "ratios", risen)

    def __call__(self, tokens: int) -> float:
        """The cost of a pass over so many tokens."""
        lines = list(pairwise(self.ratios.items()))
        (low, cost), (high, more) = next((line for line in lines if tokens <= line[1][0]), lines[-1])
        return cost + (more - cost) * (tokens - low) / (high - low)


def pass_costs(model: nn.Module, *, rounds: int = 7) -> PassCosts:
    """What passes of `model` cost on this machine, measured in turn, which takes some seconds.

    Measured once: kept in the user's cache by the model's weights and type, device, processor, instructions and threads.

    Args:
        model: The target, as it will be used: in its type, on its device, its linear layers packed or not.
        rounds: How often each size has its turn; the median counts.

    Raises:
        TypeError, ValueError: a model that cannot be a `Target`.
    """

    def measure() -> dict[str, float]:
        room = _Room(model)
        sizes = [size for size in _TOKENS if target.context is None or size < target.context - _TEXT] or [1, 2]
        seconds = in_turn([room.reading(size) for size in sizes], target.device, rounds)
        return {str(size): each / seconds[0] for size, each in zip(sizes, seconds, strict=True)}

    target = Target(model)
    found = _kept({"what": "passes", **_machine(model, target)}, measure)
    return PassCosts({int(tokens): cost for tokens, cost in found.items()})


@dataclass(frozen=True)
class Choice:
    """A tree, and what it promises.

    Attributes:
        tree: The tree; one of no nodes where no drafting pays.
        vocabulary: How many of the most frequent tokens are drafted; None for all, or those that the drafter has.
        gain: Tokens a second, in those of plain decoding.
        tokens: Tokens that a call gives.
        cost: What a call costs in plain passes, drafting included.
    """

    tree: TreeShape
    gain: float
    tokens: float
    cost: float
    vocabulary: int | None = None

    def __str__(self) -> str:
        if not self.tree.paths:
            return "no drafting pays here: text is written plainly"
        return (
            f"{len(self.tree) - 1} nodes, {self.tree.depth} deep: {self.tokens:.2f} tokens for {self.cost:.2f} plain passes, "
            f"about {self.gain:.2f} times plain decoding"
        )


def fastest_tree(
    accuracy: Tensor,
    costs: Callable[[int], float],
    drafting: Callable[[Sequence[TreeShape]], Sequence[float]] | None = None,
) -> Choice:
    """The tree of most tokens a second: of what is accepted of it over what reading and drafting it cost.

    Of each size and depth the tree that should be accepted furthest is tried (see `TreeShape.best`), up to 63 nodes, and
    that of none, which is plain decoding and costs one pass a token.

    Args:
        accuracy: How often each rank is right at each depth, (depth, ranks), as `rank_accuracy` measures it.
        costs: Cost of a pass over n tokens in passes over one, such as `PassCosts`.
        drafting: Cost of drafting each of some trees, likewise; nothing if None.

    Example:
        >>> right = torch.tensor([[0.6, 0.2], [0.5, 0.1]])
        >>> fastest_tree(right, lambda tokens: 1 + 0.1 * (tokens - 1)).tree.paths
        ((0,), (1,), (0, 0))
        >>> print(fastest_tree(right, lambda tokens: tokens))
        no drafting pays here: text is written plainly
    """
    depths = range(1, len(accuracy) + 1)
    each = (TreeShape.best(accuracy[:depth], nodes) for depth in depths for nodes in _NODES)
    trees = list({tree.paths: tree for tree in each}.values())
    best = Choice(TreeShape([]), 1.0, 1.0, 1.0)
    for tree, extra in zip(trees, drafting(trees) if drafting else [0.0] * len(trees), strict=True):
        tokens, cost = tree.expected_length(accuracy), costs(len(tree)) + extra
        if tokens / cost > best.gain:
            best = Choice(tree, tokens / cost, tokens, cost)
    return best


def choose_tree(
    drafter: Drafter, model: nn.Module, accuracy: Tensor, costs: Callable[[int], float] | None = None
) -> Choice:
    """`fastest_tree` for a drafter of trees of fixed shape on this machine; kept as `pass_costs` are, and not set.

    Args:
        drafter: Its `tree` can be set.
        model: The target.
        accuracy: As for `fastest_tree`.
        costs: Instead of this machine's; then drafting costs nothing.
    """
    if costs is not None:
        return fastest_tree(accuracy, costs)
    target = Target(model)

    def measure() -> dict[str, Any]:
        choice = fastest_tree(accuracy, pass_costs(model), lambda trees: _between(trees, drafter, model))
        return {"gain": choice.gain, "tokens": choice.tokens, "cost": choice.cost, "paths": choice.tree.paths}

    key = {
        "what": "tree", "drafter": weights_digest(drafter), "accuracy": accuracy.tolist(), **_machine(drafter, target),
        "passes": _machine(model, target),
    }  # fmt: skip
    found = _kept(key, measure)
    return Choice(TreeShape(found["paths"]), found["gain"], found["tokens"], found["cost"])


def choose_nodes(drafter: Drafter, model: nn.Module, tokens: Mapping[int, float]) -> tuple[int, float]:
    """How many nodes of a dynamic tree give the most tokens a second on this machine, 0 for none; and how many times plain.

    Args:
        drafter: Its `nodes` can be set; they are not.
        model: The target.
        tokens: Tokens that a call gives, by nodes.
    """
    target = Target(model)

    def measure() -> dict[str, Any]:
        passes, sizes = pass_costs(model), list(tokens)
        drafting = drafting_costs(drafter, model, sizes, of="nodes")
        gains = {size: tokens[size] / (passes(size + 1) + extra) for size, extra in zip(sizes, drafting, strict=True)}
        best = max(gains, key=gains.__getitem__)
        return {"nodes": best, "gain": gains[best]} if gains[best] > 1 else {"nodes": 0, "gain": 1.0}

    key = {
        "what": "nodes", "drafter": weights_digest(drafter), "tokens": sorted(tokens.items()), "passes": _machine(model, target),
        **_machine(drafter, target),
    }  # fmt: skip
    found = _kept(key, measure)
    return found["nodes"], found["gain"]


@torch.inference_mode()
def drafting_costs(
    drafter: Drafter, model: nn.Module, settings: Sequence[Any], *, of: str = "tree", rounds: int = 5
) -> list[float]:
    """What it costs `drafter` to draft with each setting, in passes of `model` over one token, measured in turn.

    Args:
        drafter: As it was before when this returns.
        model: The target.
        settings: Trees, or numbers of nodes.
        of: What is set, "tree" or "nodes".
        rounds: How often each has its turn; the median counts.
    """
    room, before = _Room(model), getattr(drafter, of)
    state = drafter.start(room.target, 1, Sampling())
    committed, root = room.committed()
    drafter.propose(state, committed, root)
    # As many as a call gives or so.
    committed = committed._replace(tokens=committed.tokens[:, :2], hidden=committed.hidden[:, :2], lengths=[2])

    def draft(setting: Any) -> Callable[[], object]:
        def call() -> object:
            setattr(drafter, of, setting)
            return drafter.propose(state, committed, root)

        return call

    try:
        plain, *drafts = in_turn([room.reading(1), *map(draft, settings)], room.target.device, rounds)
    finally:
        setattr(drafter, of, before)
    return [each / plain for each in drafts]


def drafting_gain(
    drafter: Drafter, model: nn.Module, prompt: Tensor, *, new_tokens: int = 24, rounds: int = 3
) -> float:
    """Tokens a second that `drafter` gives, in those of plain decoding, timed in turn; kept as `pass_costs` are.

    For drafters whose tree is not chosen by what passes and drafts cost.

    Args:
        drafter: As it will be used.
        model: The target.
        prompt: (1, length) token ids, behind which greedy text is written.
        new_tokens: Of that text.
        rounds: How often each has its turn; the median counts.
    """
    from paperworks.decoding.engine import generate

    target = Target(model)

    def measure() -> dict[str, float]:
        ways = [
            lambda way=way: generate(model, prompt, drafter=way, max_new_tokens=new_tokens) for way in (None, drafter)
        ]
        plain, drafted = in_turn(ways, target.device, rounds)
        return {"gain": plain / drafted}

    key = {
        "what": "gain", "drafter": weights_digest(drafter), "kind": repr(getattr(drafter, "tree", None)), "prompt": prompt.tolist(),
        "tokens": new_tokens, "passes": _machine(model, target), **_machine(drafter, target),
    }  # fmt: skip
    return _kept(key, measure)["gain"]


def _between(trees: Sequence[TreeShape], drafter: Drafter, model: nn.Module) -> list[float]:
    """What drafting each tree costs: of each depth the smallest, a middle and the largest are measured."""
    ends: list[TreeShape] = []
    for depth in sorted({tree.depth for tree in trees}):
        alike = sorted((tree for tree in trees if tree.depth == depth), key=len)
        ends += {len(tree): tree for tree in (alike[0], alike[len(alike) // 2], alike[-1])}.values()
    measured = list(zip(ends, drafting_costs(drafter, model, ends), strict=True))

    def cost(tree: TreeShape) -> float:
        known = {len(end): each for end, each in measured if end.depth == tree.depth}
        return float(np.interp(len(tree), list(known), list(known.values())))

    return [cost(tree) for tree in trees]


def in_turn(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Median seconds of each call, made in turn after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, taken in zip(calls, seconds, strict=True):
            _wait(device)
            start = perf_counter()
            call()
            _wait(device)
            taken.append(perf_counter() - start)
    return [median(taken[1:]) for taken in seconds]


class _Room:
    """A text that a model has read, behind which it reads trees."""

    def __init__(self, model: nn.Module) -> None:
        self.target = Target(model)
        length = _TEXT if self.target.context is None else max(2, min(_TEXT, self.target.context // 2))
        # Any will do.
        self.text = torch.arange(length, device=self.target.device) % self.target.vocab_size
        self.cache = TreeCache(self.target.config, 1)
        with torch.inference_mode():
            self.hidden = self.target.prefill([self.text], self.cache)[1]

    def committed(self) -> tuple[Any, Tensor]:
        """The text as a drafter is told of it, and the token that follows."""
        from paperworks.decoding.drafter import Committed

        return Committed(self.text[None], self.hidden, [len(self.text)]), self.text[:1]

    def reading(self, tokens: int) -> Callable[[], object]:
        """A pass over a tree of so many tokens, of which nothing is kept."""
        shape = TreeShape([(0,) * depth + (rank,) for depth in range(4) for rank in range(16)][: tokens - 1])

        @torch.inference_mode()
        def read() -> object:
            ids = torch.zeros(1, len(shape), dtype=torch.long, device=self.target.device)
            tree: TokenTree = self.target.readable(shape.tree(ids), self.cache)
            return self.target.verify(tree, self.cache)

        return read


def _machine(model: nn.Module, target: Target) -> dict[str, Any]:
    """All that the cost of a pass hangs on."""
    device = target.device
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return {
        "model": weights_digest(model),
        "dtype": str(target.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor.name(),
        "instructions": processor.instructions(),
        "threads": torch.get_num_threads(),
        "attention": target.config._attn_implementation,
        "packed": sum("forward" in vars(layer) for layer in linear),
        "versions": [__version__, torch.__version__],
    }


def _kept(key: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured for `key`, now or before."""
    text = json.dumps(key, sort_keys=True)
    path = user_cache_path("paperworks") / "costs" / f"{sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == text:
            return dict(kept["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    measured = measure()
    _write(path, json.dumps({"key": text, "measured": measured}, indent=1))
    # As it will be read.
    return dict(json.loads(json.dumps(measured)))


def _write(path: Path, text: str) -> None:
    """Put a file in its place whole, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
