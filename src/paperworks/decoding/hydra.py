"""Hydra: draft heads that see the tokens drafted before them (arXiv 2402.05109), and Medusa's, which do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.draft_layer import DraftLayer
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.training import Prediction, distillation_loss
from paperworks.decoding.tree import TokenTree, TreeShape
from paperworks.nn import packed_scorer

Score = Callable[[Tensor], Tensor]
# How often rank r at a depth is right, before anything has been measured: gives a first tree of the paper's size.
_PRIOR = torch.tensor([[0.5 * 0.85**depth * 0.35**rank for rank in range(10)] for depth in range(8)])


class _Head(nn.Module):
    """One draft head's body: z -> R z + SiLU(A z), then residual blocks u -> u + SiLU(A' u)."""

    def __init__(self, inputs: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, size)
        self.residual: nn.Module = nn.Identity()
        if inputs != size:
            # From zero too: random products of states and embeddings would first have to be unlearnt.
            self.residual = nn.Linear(inputs, size, bias=False)
            nn.init.zeros_(self.residual.weight)
        blocks = [nn.Linear(size, size) for _ in range(layers - 1)]
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(dropout)
        for block in (self.first, *blocks):
            nn.init.zeros_(block.weight)

    def forward(self, z: Tensor) -> Tensor:
        u = self.residual(z) + F.silu(self.first(z))
        for block in self.blocks:
            u = u + F.silu(block(self.dropout(u)))
        return u


class Hydra(Drafter):
    """Draft heads in sequence: head i reads the target's last state and every token drafted before its own.

    Head i predicts the token i + 2 places after the state h_t from z_i = [h_t ; E(x_{t+1}) ; ... ; E(x_{t+1+i})], where
    x_{t+1} is the token that the target has already chosen and E its embedding. Each branch of the tree thus gets a
    prediction of its own. With `prefix_layer=True` (Hydra++) h_t first passes through one decoder layer that attends to
    all earlier states.

    Make one with `Hydra.from_target(model)`, train it with `paperworks.decoding.train_drafter`, and pass it to
    `generate(model, ids, drafter=...)`.

    Args:
        target: The model to draft for.
        heads: Draft heads K; the tree is at most K deep.
        layers: Blocks in each head, its input block included.
        prefix_layer: Hydra++'s extra attention layer.
        tie_lm_head: Score tokens with the target's frozen head instead of a copy for each draft head.
        vocabulary: Draft only these tokens (ids), or None for all. Fewer are much cheaper to score, and verification
            keeps the output the same.
        tree: Paths of the tree, see `TreeShape`; a tree of the paper's size (63 drafted nodes) by default.
        dropout: Between blocks, in training.
        label_weight: Weight of the cross-entropy with the text itself.
        teacher_weight: Weight of the cross-entropy with the target's distribution.
        state_weight: Weight of the smooth L1 distance between a head's state and the target's.
        noise: NEFT-style uniform noise on states and embeddings in training, alpha / sqrt(length * d).

    Raises:
        ValueError: an argument out of range, a tree deeper than there are heads or wider than the vocabulary.
        TypeError, ValueError: a model that cannot be a `Target`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> hydra = Hydra.from_target(model, heads=2, tree=[(0,), (1,), (0, 0)])
        >>> from paperworks.decoding import generate
        >>> result = generate(model, torch.tensor([[1, 2, 3]]), drafter=hydra, max_new_tokens=8, eos_token_id=[])
        >>> plain = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, eos_token_id=[])
        >>> bool((result.sequences == plain.sequences).all())
        True
    """

    conditioned: ClassVar[bool] = True
    vocabulary: Tensor | None
    embedding_scale: Tensor

    def __init__(
        self,
        target: Target,
        *,
        heads: int = 4,
        layers: int = 1,
        prefix_layer: bool = False,
        tie_lm_head: bool = True,
        vocabulary: Tensor | None = None,
        tree: Sequence[Sequence[int]] | None = None,
        dropout: float = 0.0,
        label_weight: float = 0.0,
        teacher_weight: float = 1.0,
        state_weight: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("heads", heads), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if min(label_weight, teacher_weight, state_weight, noise) < 0 or label_weight + teacher_weight == 0:
            raise ValueError("loss weights and noise must not be negative, and label_weight or teacher_weight positive")
        size = target.hidden_size
        self.options: dict[str, Any] = {
            "layers": layers,
            "tie_lm_head": tie_lm_head,
            "dropout": dropout,
            "label_weight": label_weight,
            "teacher_weight": teacher_weight,
            "state_weight": state_weight,
            "noise": noise,
        }
        target.check_states()
        self.register_buffer("vocabulary", vocabulary)
        self.scored = target.vocab_size if vocabulary is None else len(vocabulary)
        # Embeddings are an order of magnitude smaller than states. A constant, which the heads' first weights could take
        # in, brings them to unit size, so that both train at one learning rate.
        embeddings = target.embed(torch.arange(target.vocab_size, device=target.device)[:4096])
        self.register_buffer("embedding_scale", embeddings.float().pow(2).mean().rsqrt())
        self.heads = nn.ModuleList(
            _Head((i + 2) * size if self.conditioned else size, size, layers, dropout) for i in range(heads)
        )
        self.tree = TreeShape(tree) if tree is not None else TreeShape.best(_PRIOR[:heads, : self.scored], 63)
        self.prefix = DraftLayer(target) if prefix_layer else None
        self.scorers: nn.ModuleList | None = None
        if not tie_lm_head:
            start = target.scorer(vocabulary)
            scorers = [nn.Linear(size, len(start.weight)) for _ in range(heads)]
            for scorer in scorers:
                scorer.weight.data.copy_(start.weight)
                nn.init.zeros_(scorer.bias) if start.bias is None else scorer.bias.data.copy_(start.bias)
            self.scorers = nn.ModuleList(scorers)

    @property
    def tree(self) -> TreeShape:
        """Shape of the drafted tree; may be replaced, as `fit_tree` does."""
        return self._tree

    @tree.setter
    def tree(self, tree: TreeShape) -> None:
        if tree.depth > len(self.heads):
            raise ValueError(
                f"the tree is {tree.depth} deep but there are {len(self.heads)} heads: use at most one level a head"
            )
        if (width := max((level.width for level in tree.levels), default=0)) > self.scored:
            raise ValueError(f"the tree wants the best {width} tokens but only {self.scored} are scored: give a tree")
        self._tree = tree

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; the vocabulary by its size, its ids being among the weights."""
        return {
            "heads": len(self.heads),
            "prefix_layer": self.prefix is not None,
            "vocabulary": None if self.vocabulary is None else len(self.vocabulary),
            "tree": [list(path) for path in self.tree.paths],
            **self.options,
        }

    class State(NamedTuple):
        """Of one generation: the target, what scores drafts where it is the target's head, and the prefix layer's cache."""

        target: Target
        score: Score | None
        cache: TreeCache | None

    def start(self, target: Target, batch: int, sampling: Sampling) -> State:
        """Look up the rows of the target's head that score drafts."""
        head = target.scorer(self.vocabulary)
        score: Score | None = None
        if self.scorers is None and self.vocabulary is not None:
            # Few rows; to pack a whole head for each generation could cost more than it saves.
            score = packed_scorer(head.weight, head.bias)
        elif self.scorers is None:
            score = head
        # Scale and cap leave the best tokens the best: where only those are wanted they can be left out.
        return self.State(target, score, self.prefix.new_cache(batch) if self.prefix is not None else None)

    def propose(
        self, state: State, committed: Committed, root: Tensor, generator: torch.Generator | None = None
    ) -> TokenTree:
        """Fill the tree level by level, each head reading the tokens on the path to each node that has children."""
        if not self.tree.levels:
            return TokenTree.chain(root[:, None])
        if self.prefix is not None:
            assert state.cache is not None
            mixed = self.prefix.append(committed.hidden, committed.lengths, state.cache)
            committed = committed._replace(hidden=mixed)
        h = committed.last_hidden
        tokens = root.new_zeros(len(root), len(self.tree))
        tokens[:, 0] = root
        embedded = h.new_zeros(*tokens.shape, h.shape[-1])
        embedded[:, :1] = self._embed(state.target, tokens[:, :1])
        for head, level in enumerate(self.tree.levels):
            paths = level.paths.to(root.device)
            z = h[:, None].expand(-1, len(paths) if self.conditioned else 1, -1)
            if self.conditioned:
                z = torch.cat([z, embedded[:, paths].flatten(2)], dim=-1)
            best = self._scores(head, self.heads[head](z), state.score).topk(level.width).indices
            owners = level.owners.to(root.device) if self.conditioned else 0
            children = best[:, owners, level.ranks.to(root.device)]
            if self.vocabulary is not None:
                children = self.vocabulary[children]
            span = slice(level.first_child, level.first_child + children.shape[1])
            tokens[:, span] = children
            if self.conditioned:
                embedded[:, span] = self._embed(state.target, children)
        return self.tree.tree(tokens)

    def _embed(self, target: Target, tokens: Tensor) -> Tensor:
        return target.embed(tokens) * self.embedding_scale

    def _scores(self, head: int, u: Tensor, score: Score | None) -> Tensor:
        if self.scorers is not None:
            return self.scorers[head](u)  # type: ignore[no-any-return]
        assert score is not None
        return score(u)

    def predictions(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Iterator[Prediction]:
        """What each head says at every position whose label may be used, given the true tokens before it."""
        scorer = target.scorer(self.vocabulary)
        embedded = self._embed(target, tokens).to(hidden.dtype)
        if self.training and self.options["noise"]:
            scale = self.options["noise"] / (hidden.shape[1] * hidden.shape[2]) ** 0.5
            hidden = hidden + scale * (2 * torch.rand_like(hidden) - 1)
            embedded = embedded + scale * (2 * torch.rand_like(embedded) - 1)
        states = self.prefix(hidden) if self.prefix is not None else hidden
        for i, head in enumerate(self.heads):
            # Position t has its label at t + 2 + i; positions whose label lies past the end are never formed.
            length = tokens.shape[1] - 2 - i
            if length < 1:
                break
            labelled = mask[:, 2 + i :]
            parts = [states[:, :length]]
            if self.conditioned:
                parts += [embedded[:, 1 + j : 1 + j + length] for j in range(i + 1)]
            u = head(torch.cat([part[labelled] for part in parts], dim=-1))
            yield Prediction(
                logits=scorer(u) if self.scorers is None else scorer.finish(self.scorers[i](u)),
                labels=tokens[:, 2 + i :][labelled],
                positions=labelled.nonzero() + torch.tensor([0, 1 + i], device=tokens.device),
                state=u,
            )

    def loss(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Sum over heads of the weighted label, teacher and state losses."""
        return distillation_loss(
            self.predictions(target, tokens, hidden, mask),
            target,
            hidden,
            self.vocabulary,
            label_weight=self.options["label_weight"],
            teacher_weight=self.options["teacher_weight"],
            state_weight=self.options["state_weight"],
        )


class Medusa(Hydra):
    """Independent draft heads (arXiv 2401.10774): every head reads the target's last state and nothing else.

    The baseline of Hydra's paper. The arguments are Hydra's.
    """

    conditioned = False
