"""Token trees: what a drafter proposes and the target checks in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Draw = Literal["point", "with_replacement", "without_replacement"]


@dataclass(frozen=True)
class TokenTree:
    """A batch of trees of drafted tokens whose node 0 is the last token chosen by the target.

    Nodes come in an order in which parents precede children, and siblings in the order in which they were drawn. A
    node other than the root whose parent is -1 is padding: nothing connects to it and it can never be accepted.

    Attributes:
        tokens: Token of every node, shape (batch, nodes), int64.
        parents: Index of every node's parent, shape (batch, nodes), -1 for the root.
        draft_probs: Distribution from which the children of each node were drawn, shape (batch, nodes, vocab);
            None when children were chosen deterministically.
        draw: How siblings were drawn from `draft_probs`; exact acceptance needs to know.

    Example:
        >>> tree = TokenTree.chain(torch.tensor([[5, 6, 7]]))
        >>> tree.depths.tolist(), tree.ancestors[0].int().tolist()
        ([[0, 1, 2]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    """

    tokens: Tensor
    parents: Tensor
    draft_probs: Tensor | None = None
    draw: Draw = "point"

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.parents.shape:
            raise ValueError(
                f"tokens and parents must both have shape (batch, nodes), got {tuple(self.tokens.shape)} "
                f"and {tuple(self.parents.shape)}"
            )
        if (self.draft_probs is None) != (self.draw == "point"):
            raise ValueError(f"draw={self.draw!r} does not fit draft_probs: give both, or neither with draw='point'")

    @classmethod
    def chain(cls, tokens: Tensor) -> TokenTree:
        """A tree without branches: `tokens` (batch, nodes), the root first."""
        nodes = tokens.shape[1]
        tree = cls(tokens, torch.arange(-1, nodes - 1, device=tokens.device).expand_as(tokens))
        # Known beforehand: to work it out takes products of (nodes, nodes) matrices, and a prompt is a chain too.
        line = torch.ones(nodes, nodes, dtype=torch.bool, device=tokens.device).tril()
        tree.__dict__["ancestors"] = line.expand(len(tokens), -1, -1)
        return tree

    @cached_property
    def ancestors(self) -> Tensor:
        """Whether node j lies on the path from the root to node i, i itself included: (batch, nodes, nodes)."""
        batch, nodes = self.tokens.shape
        reach = torch.eye(nodes, device=self.tokens.device).expand(batch, -1, -1).clone()
        child = self.parents >= 0
        reach[child.nonzero()[:, 0], child.nonzero()[:, 1], self.parents[child]] = 1
        for _ in range(max(nodes - 1, 1).bit_length()):
            reach = (reach @ reach).clamp_(max=1)
        return reach.bool()

    @cached_property
    def depths(self) -> Tensor:
        """Edges from the root to each node, shape (batch, nodes)."""
        return self.ancestors.sum(-1) - 1

    @property
    def is_chain(self) -> bool:
        """Whether every node is the parent of the next, in every row."""
        line = torch.arange(-1, self.tokens.shape[1] - 1, device=self.tokens.device)
        return bool((self.parents == line).all())

    def up_to(self, depth: int) -> TokenTree:
        """The same tree without nodes deeper than `depth` in every row."""
        keep = (self.depths <= depth).any(0)
        if bool(keep.all()):
            return self
        renumber = keep.cumsum(0) - 1
        parents = self.parents[:, keep]
        parents = torch.where(parents >= 0, renumber[parents.clamp(min=0)], parents)
        probs = None if self.draft_probs is None else self.draft_probs[:, keep]
        return TokenTree(self.tokens[:, keep], parents, probs, self.draw)

    def first_path(self) -> TokenTree:
        """The root, its first child, of that the first child and so on, of a batch of one tree.

        Example:
            >>> tree = TokenTree(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-1, 0, 0, 1]]))
            >>> tree.first_path().tokens.tolist()
            [[5, 6, 8]]
        """
        (parents,) = self.parents.tolist()
        path = [0]
        for node, parent in enumerate(parents):
            if parent == path[-1]:
                path.append(node)
        chain = TokenTree.chain(self.tokens[:, path])
        if self.draft_probs is None:
            return chain
        return TokenTree(chain.tokens, chain.parents, self.draft_probs[:, path], self.draw)


class TreeShape:
    """A fixed set of paths, path (r0, r1, ..) meaning "the child of rank r0, of that the child of rank r1, ..".

    Args:
        paths: The paths in any order; missing prefixes are an error.

    Attributes:
        paths: The paths, by depth.
        parents: Parent of every node, root first, ordered by depth: (nodes,).
        depth: Length of the longest path.
        levels: How to expand each depth but the last.

    Raises:
        ValueError: a path is empty, repeated, negative, or its prefix is missing.

    Example:
        >>> shape = TreeShape([(0,), (1,), (0, 0)])
        >>> shape.parents.tolist(), shape.depth
        ([-1, 0, 0, 1], 2)
    """

    @dataclass(frozen=True)
    class Level:
        """Expansion of one depth.

        Attributes:
            paths: For every node with children, the nodes from the root to it, (nodes with children, depth + 1).
            owners: Which of those nodes each child belongs to.
            ranks: Rank of each child.
            first_child: Index of the first child; the others follow.
        """

        paths: Tensor
        owners: Tensor
        ranks: Tensor
        first_child: int

        @property
        def width(self) -> int:
            """How many of the best ranked tokens this level needs."""
            return int(self.ranks.max()) + 1

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        ordered = sorted((tuple(int(rank) for rank in path) for path in paths), key=lambda path: (len(path), path))
        index: dict[tuple[int, ...], int] = {(): 0}
        for path in ordered:
            if not path or path in index or min(path) < 0:
                raise ValueError(f"tree paths must be distinct, non-empty and of ranks >= 0, got {path}")
            if path[:-1] not in index:
                raise ValueError(f"tree path {path} is given, but its prefix {path[:-1]} is not")
            index[path] = len(index)
        self.paths = tuple(ordered)
        self.parents = torch.tensor([-1] + [index[path[:-1]] for path in ordered])
        self.depth = max((len(path) for path in ordered), default=0)
        self.levels = tuple(self._level(index, depth) for depth in range(self.depth))

    def _level(self, index: dict[tuple[int, ...], int], depth: int) -> Level:
        children = [path for path in self.paths if len(path) == depth + 1]
        open_paths = sorted({path[:-1] for path in children})
        node_paths = [[index[path[:length]] for length in range(depth + 1)] for path in open_paths]
        owners = torch.tensor([open_paths.index(path[:-1]) for path in children])
        ranks = torch.tensor([path[-1] for path in children])
        return self.Level(torch.tensor(node_paths), owners, ranks, index[children[0]])

    def __len__(self) -> int:
        """Nodes, root included."""
        return len(self.paths) + 1

    @classmethod
    def best(cls, accuracy: Tensor, nodes: int) -> TreeShape:
        """The `nodes` paths most likely to be accepted, if depths were independent.

        A path's chance is the product of its ranks' measured accuracies; taking the highest products gives a set that
        is closed under prefixes, because a product never exceeds that of its prefix.

        Args:
            accuracy: `accuracy[d, r]` is how often the token of rank r at depth d is right, given that the path before
                it is, shape (depth, ranks), within [0, 1].
            nodes: Nodes besides the root.

        Example:
            >>> TreeShape.best(torch.tensor([[0.6, 0.2], [0.5, 0.1]]), nodes=3).paths
            ((0,), (1,), (0, 0))
        """
        if accuracy.ndim != 2 or not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
            raise ValueError(f"accuracy must be (depth, ranks) within [0, 1], got shape {tuple(accuracy.shape)}")
        if nodes < 1:
            raise ValueError(f"a tree needs at least one node besides the root, got nodes={nodes}")
        table = accuracy.double().tolist()
        chosen: list[tuple[int, ...]] = []
        open_paths: dict[tuple[int, ...], float] = {(rank,): chance for rank, chance in enumerate(table[0])}
        while open_paths and len(chosen) < nodes:
            path = max(open_paths, key=lambda path: (open_paths[path], [-rank for rank in path]))
            chance = open_paths.pop(path)
            chosen.append(path)
            if len(path) < len(table):
                open_paths |= {(*path, rank): chance * right for rank, right in enumerate(table[len(path)])}
        return cls(chosen)

    def expected_length(self, accuracy: Tensor) -> float:
        """Tokens accepted per target call that `accuracy` promises for this tree, the target's own token included."""
        return 1 + sum(float(torch.stack([accuracy[d, r] for d, r in enumerate(path)]).prod()) for path in self.paths)

    def tree(self, tokens: Tensor) -> TokenTree:
        """The token tree of this shape with `tokens` (batch, nodes); its topology is worked out once per shape."""
        tree = TokenTree(tokens, self.parents.to(tokens.device).expand_as(tokens))
        if self._ancestors.device != tokens.device:
            self._ancestors = self._ancestors.to(tokens.device)
        tree.__dict__["ancestors"] = self._ancestors.expand(tokens.shape[0], -1, -1)
        return tree

    @cached_property
    def _ancestors(self) -> Tensor:
        return TokenTree(torch.zeros(1, len(self), dtype=torch.long), self.parents[None]).ancestors
