"""Which drafted tokens to keep: greedy, exact and typical acceptance over a token tree."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from paperworks.decoding.sampling import Sampling, check_logits, draw
from paperworks.decoding.tree import TokenTree


class Accepted(NamedTuple):
    """What became of a tree.

    Attributes:
        path: Accepted nodes from the root on, shape (batch, depth + 1), padded with -1.
        lengths: Accepted nodes of each row, root included, shape (batch,).
        next_tokens: The token that follows each path, shape (batch,): the root of the next tree.
    """

    path: Tensor
    lengths: Tensor
    next_tokens: Tensor


class Acceptance(Protocol):
    """Decides on a tree, given the target's logits at its nodes (batch, nodes, vocab)."""

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
    ) -> Accepted:
        """Choose a path and the token after it."""
        ...


def longest_path(tree: TokenTree, agreed: Tensor, score: Tensor | None = None) -> Accepted:
    """The deepest path on which every node but the root is `agreed` (batch, nodes); ties go to the higher `score`.

    `next_tokens` is left at -1 for the caller to choose.
    """
    if tree.tokens.shape[1] == 1:
        # Plain decoding comes here at every token.
        root = tree.tokens.new_zeros(len(tree.tokens), 1)
        return Accepted(root, root[:, 0] + 1, root[:, 0] - 1)
    agreed = agreed | (tree.parents < 0)
    whole = (agreed[:, None, :] | ~tree.ancestors).all(-1) & tree.ancestors[:, :, 0]
    depth = torch.where(whole, tree.depths, -1)
    if score is not None:
        deepest = depth == depth.amax(-1, keepdim=True)
        last = torch.where(deepest, score, -torch.inf).argmax(-1)
    else:
        last = depth.argmax(-1)
    rows = torch.arange(len(last), device=last.device)
    on_path = tree.ancestors[rows, last]
    lengths = on_path.sum(-1)
    order = torch.where(on_path, tree.depths, tree.tokens.shape[1]).argsort(dim=-1, stable=True)
    path = order[:, : int(lengths.max())]
    path = path.masked_fill(torch.arange(path.shape[1], device=path.device) >= lengths[:, None], -1)
    return Accepted(path, lengths, torch.full_like(last, -1))


def _at_end(accepted: Accepted, values: Tensor) -> Tensor:
    """`values` (batch, nodes, ...) at the last node of each path."""
    rows = torch.arange(len(accepted.lengths), device=values.device)
    return values[rows, accepted.path[rows, accepted.lengths - 1]]


class Greedy:
    """Keep a node when it is the target's most likely token; the output is the target's own greedy text."""

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Accepted:
        """Accept the path of argmax tokens."""
        # One pass over the logits; `argmax` takes four times as long on a CPU.
        largest, choice = logits.max(-1)
        check_logits(largest[..., None])
        accepted = longest_path(tree, tree.tokens == choice.gather(1, tree.parents.clamp(min=0)))
        return accepted._replace(next_tokens=_at_end(accepted, choice))


class Exact:
    """Multi-round rejection sampling: the output follows the target's law exactly, whatever was drafted.

    Walks down from the root. Children chosen deterministically: draw the next token from the target and descend if a
    child holds it. Children drawn from a distribution d: accept each in turn with probability min(1, p / d); after a
    rejection p becomes the normalised positive part of p - d, and, for draws without replacement, d loses the
    rejected token (arXiv 2402.14160, algorithm of recursive rejection).
    """

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Accepted:
        """Accept a path and draw the token behind it."""
        rows = torch.arange(tree.tokens.shape[0], device=logits.device)
        node = torch.zeros_like(rows)
        walking = torch.ones_like(rows, dtype=torch.bool)
        path, next_tokens = [node], torch.full_like(rows, -1)
        while True:
            law = sampling.probabilities(logits[rows, node])
            is_child = (tree.parents == node[:, None]) & walking[:, None]
            if tree.draw == "point" and type(self).judged_by is Exact.judged_by:
                token = draw(law, generator)
                hit = is_child & (tree.tokens == token[:, None])
                child = torch.where(hit.any(-1), hit.int().argmax(-1), -1)
            else:
                possible = logits[rows, node] > -torch.inf
                child, law = self._rejection_rounds(tree, node, is_child, law, possible, generator)
                token = draw(law, generator) if bool((walking & (child < 0)).any()) else torch.zeros_like(rows)
            stopping = walking & (child < 0)
            next_tokens = torch.where(stopping, token, next_tokens)
            walking = walking & (child >= 0)
            if not bool(walking.any()):
                break
            node = torch.where(walking, child, node)
            path.append(torch.where(walking, child, -1))
        stacked = torch.stack(path, dim=1)
        return Accepted(stacked, (stacked >= 0).sum(1), next_tokens)

    def judged_by(self, law: Tensor, token: Tensor) -> Tensor:
        """The law (batch, vocab) by which each row's drafted `token` (batch,) is judged: the target's own."""
        return law

    def _rejection_rounds(
        self,
        tree: TokenTree,
        node: Tensor,
        is_child: Tensor,
        law: Tensor,
        possible: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """The accepted child of each row (-1 for none) and the law from which to draw where there is none.

        However a token is judged, it is not accepted where it is not `possible` (batch, vocab).
        """
        rows = torch.arange(len(node), device=law.device)
        proposal = tree.draft_probs[rows, node].to(law.dtype) if tree.draft_probs is not None else law
        accepted = torch.full_like(node, -1)
        order = torch.where(is_child, torch.arange(is_child.shape[1], device=law.device), is_child.shape[1])
        for candidate in order.sort(dim=-1).values.T:
            offered = (candidate < is_child.shape[1]) & (accepted < 0)
            if not bool(offered.any()):
                break
            slot = candidate.clamp(max=is_child.shape[1] - 1)
            token = tree.tokens[rows, slot]
            if tree.draw == "point":
                proposal = torch.zeros_like(law).scatter(-1, token[:, None], 1.0)
            judged = self.judged_by(law, token).where(possible[rows, token][:, None], law)
            chance = (judged[rows, token] / proposal[rows, token]).nan_to_num(0.0, posinf=1.0).clamp(max=1.0)
            yes = draw(torch.stack([1 - chance, chance], -1), generator).bool() & offered
            accepted = torch.where(yes, slot, accepted)
            rejected = (offered & ~yes)[:, None]
            residual = (judged - proposal).clamp(min=0)
            mass = residual.sum(-1, keepdim=True)
            # Rounding can leave nothing of p - d when p is about d; p itself is then as good as exact.
            law = torch.where(rejected & (mass > 0), residual / mass.clamp(min=torch.finfo(law.dtype).tiny), law)
            if tree.draw == "without_replacement":
                rest = proposal.scatter(-1, token[:, None], 0.0)
                rest = rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(law.dtype).tiny)
                proposal = torch.where(rejected, rest, proposal)
        return accepted, law


class Typical:
    """Keep a token that is typical enough of the target's law: p(x) > min(epsilon, alpha * exp(-entropy)).

    Faster than exact acceptance at temperatures above 0 and not lossless. The token after the path is drawn from the
    target. (Medusa, arXiv 2401.10774.)

    Args:
        epsilon: Probability that always suffices.
        alpha: Fraction of exp(-entropy) that suffices.
    """

    def __init__(self, epsilon: float = 0.09, alpha: float = 0.3) -> None:
        if not 0 < epsilon <= 1 or alpha <= 0:
            raise ValueError(f"epsilon must be within (0, 1] and alpha positive, got {epsilon} and {alpha}")
        self.epsilon, self.alpha = epsilon, alpha

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Accepted:
        """Accept the longest typical path, ties by the sum of log-probabilities."""
        law = sampling.probabilities(logits)
        log_law = law.clamp(min=torch.finfo(law.dtype).tiny).log()
        threshold = (self.alpha * (law * log_law).sum(-1).exp()).clamp(max=self.epsilon)
        parents = tree.parents.clamp(min=0)
        chance = law.gather(1, parents[..., None].expand(-1, -1, law.shape[-1])).gather(2, tree.tokens[..., None])[
            ..., 0
        ]
        log_chance = chance.clamp(min=torch.finfo(law.dtype).tiny).log().masked_fill(tree.parents < 0, 0.0)
        score = (tree.ancestors * log_chance[:, None]).sum(-1)
        accepted = longest_path(tree, chance > threshold.gather(1, parents), score)
        return accepted._replace(next_tokens=draw(_at_end(accepted, law), generator))
