"""LANTERN: drafted image codes are judged together with the codes that look alike (arXiv 2410.03355)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from paperworks.decoding.acceptance import Accepted, Exact, _at_end, longest_path
from paperworks.decoding.sampling import Sampling, check_logits
from paperworks.decoding.tree import TokenTree


def nearest_codes(codebook: Tensor, count: int | None = None) -> Tensor:
    """The `count` nearest other codes of every code by Euclidean distance, nearest first, (codes, count), int64.

    Args:
        codebook: Vectors of the codes, (codes, dimensions).
        count: Neighbours to list; all by default.

    Raises:
        ValueError: not a matrix of finite numbers, or more neighbours than other codes.

    Example:
        >>> nearest_codes(torch.tensor([[0.0], [1.0], [5.0]])).tolist()
        [[1, 2], [0, 2], [1, 0]]
    """
    if codebook.ndim != 2 or not bool(codebook.isfinite().all()):
        raise ValueError(f"codebook must be finite vectors (codes, dimensions), got shape {tuple(codebook.shape)}")
    count = len(codebook) - 1 if count is None else count
    if not 0 <= count < len(codebook):
        raise ValueError(f"count must be within 0..{len(codebook) - 1}, the number of other codes, got {count}")
    nearest = []
    for rows in torch.arange(len(codebook), device=codebook.device).split(1024):
        # The quicker way, by products, would tell duplicates apart.
        distance = torch.cdist(codebook[rows].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
        # A duplicate may be as near as the code itself, which must be out of the list all the same.
        distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
        nearest.append(distance.sort(dim=1, stable=True).indices[:, :count])
    return torch.cat(nearest)


class RelaxedAcceptance(Exact):
    """Count for a drafted code the target's probability of its nearest codes too, as far as a budget allows.

    The set A(x) of a code x is its longest run of nearest neighbours whose probabilities sum to S <= `delta` (mode
    "tv": S is then the total variation between the target's law p and the law p_x that judges x), or to
    S <= (delta - 1) p(x) (mode "ratio", of LANTERN++). p_x has the mass of A(x) moved onto x. A draft from q is accepted
    with probability min(1, p_x(x) / q(x)), and after a rejection p becomes the normalised positive part of p_x - q. At
    temperature 0 a draft is kept when p(x) + S reaches the largest probability. A code that a logits processor rules out is
    not accepted for its neighbours' sake.

    The bound is for one judgement, not for the output, whose law may lie further from the target's. With `delta=0` (1
    in mode "ratio") or `neighbours=0` acceptance is exact.

    Args:
        nearest: Nearest codes of each code, (codes, k), from `nearest_codes`.
        neighbours: Consider so many of them; 1000 or all there are by default.
        delta: Budget: probability within [0, 1] (mode "tv"), or factor of p(x) of at least 1 (mode "ratio").
        mode: What the budget limits.
        first_code: Token id of code 0, where codes come behind other tokens in the vocabulary. Other tokens have no
            neighbours.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> from paperworks.decoding import Hydra, generate
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> relaxed = RelaxedAcceptance(nearest_codes(torch.randn(20, 4)), delta=0.2)
        >>> drafter = Hydra.from_target(model, heads=2, tree=[(0,), (1,), (0, 0)])
        >>> result = generate(model, torch.tensor([[1]]), drafter=drafter, acceptance=relaxed, temperature=1.0,
        ...                   max_new_tokens=8, eos_token_id=[])
        >>> len(result.new_tokens[0])
        8
    """

    def __init__(
        self,
        nearest: Tensor,
        *,
        neighbours: int | None = None,
        delta: float = 0.1,
        mode: Literal["tv", "ratio"] = "tv",
        first_code: int = 0,
    ) -> None:
        if nearest.ndim != 2 or nearest.is_floating_point():
            raise ValueError(f"nearest must be code numbers (codes, k), got {nearest.dtype} {tuple(nearest.shape)}")
        nearest = nearest.long()  # they may come as uint16, which indexes nothing
        own = torch.arange(len(nearest), device=nearest.device)[:, None]
        if bool(((nearest < 0) | (nearest >= len(nearest)) | (nearest == own)).any()):
            raise ValueError(
                f"nearest must list other codes within 0..{len(nearest) - 1} for each of as many codes, as nearest_codes does"
            )
        if mode not in ("tv", "ratio"):
            raise ValueError(f"mode must be tv or ratio, got {mode!r}")
        low, high = (0.0, 1.0) if mode == "tv" else (1.0, float("inf"))
        if not low <= delta <= high:
            raise ValueError(f"delta must be within [{low:g}, {high:g}] in mode {mode!r}, got {delta}")
        if first_code < 0 or (neighbours is not None and not 0 <= neighbours <= nearest.shape[1]):
            raise ValueError(
                f"neighbours must be within 0..{nearest.shape[1]} and first_code not negative, got {neighbours} and "
                f"{first_code}"
            )
        self.nearest = nearest[:, : 1000 if neighbours is None else neighbours]
        self.delta, self.mode, self.first_code = delta, mode, first_code

    def __call__(
        self, tree: TokenTree, logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None
    ) -> Accepted:
        """Accept a path and choose the token behind it."""
        if self.first_code + len(self.nearest) > logits.shape[-1]:
            raise ValueError(
                f"{len(self.nearest)} codes from token {self.first_code} on do not fit a vocabulary of {logits.shape[-1]}: "
                "check first_code, and that the codebook is the model's"
            )
        if not sampling.greedy:
            return super().__call__(tree, logits, sampling, generator)
        check_logits(logits)
        choice = logits.argmax(-1)
        law = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        parents = tree.parents.clamp(min=0)
        batch, nodes = parents.shape
        above = law.gather(1, parents[..., None].expand(-1, -1, law.shape[-1])).flatten(0, 1)
        tokens = tree.tokens.flatten()
        taken, _ = self._taken(above, tokens)
        moved = taken.sum(-1)
        reaches = (moved > 0) & (above.gather(1, tokens[:, None])[:, 0] + moved >= above.amax(-1))
        rows = torch.arange(batch, device=logits.device)[:, None]
        reaches &= (logits[rows, parents, tree.tokens] > -torch.inf).flatten()
        agreed = (tree.tokens == choice.gather(1, parents)) | reaches.view(batch, nodes)
        accepted = longest_path(tree, agreed)
        return accepted._replace(next_tokens=_at_end(accepted, choice))

    def judged_by(self, law: Tensor, token: Tensor) -> Tensor:
        """p_x: the law (batch, vocab) with the mass of each row's relaxed set moved onto its `token` (batch,)."""
        taken, near = self._taken(law, token)
        relaxed = law.scatter_add(1, near, -taken)
        return relaxed.scatter_add(1, token[:, None], taken.sum(-1, keepdim=True))

    def output_law(self, law: Tensor, children: Tensor) -> Tensor:
        """The law that one step really has, in closed form: how far it is from the target's is what relaxing costs.

        Args:
            law: The target's law at each node, (batch, vocab).
            children: The drafted children of each node, in order and chosen deterministically, (batch, n).

        Returns:
            The law of the token that comes behind each node, (batch, vocab): the first child kept, else the last draw.
        """
        output, reached = torch.zeros_like(law), torch.ones_like(law[:, :1])
        for token in children.T:
            judged = self.judged_by(law, token)
            chance = judged.gather(1, token[:, None])
            output = output.scatter_add(1, token[:, None], reached * chance)
            reached = reached * (1 - chance)
            residual = judged.scatter(1, token[:, None], 0.0)
            mass = residual.sum(-1, keepdim=True)
            law = torch.where(mass > 0, residual / mass.clamp(min=torch.finfo(law.dtype).tiny), law)
        return output + reached * law

    def _taken(self, law: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Probability that each of a token's neighbours gives up to it, (batch, k), and which tokens they are."""
        code = token - self.first_code
        is_code = (code >= 0) & (code < len(self.nearest))
        near = self.first_code + self.nearest.to(law.device)[code.clamp(0, len(self.nearest) - 1)]
        mass = law.gather(1, near)
        budget = self.delta if self.mode == "tv" else (self.delta - 1) * law.gather(1, token[:, None])
        within = (mass.cumsum(-1) <= budget) & is_code[:, None]
        return torch.where(within, mass, 0.0), near
