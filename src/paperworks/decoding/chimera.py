"""Chimera: a trigram encoder, a layer over all earlier states, and heads that read both (arXiv 2402.15758)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.draft_layer import DraftLayer
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Head, Target
from paperworks.decoding.training import Prediction, distillation_loss
from paperworks.decoding.tree import TokenTree, TreeShape

# Nodes at each depth of the published tree, of children among the best four.
_PUBLISHED = (4, 8, 8, 3, 2)


class TrigramEncoder(nn.Module):
    """A first idea of the state at token j from three tokens alone: e_j = B u, u = c_j + SiLU(A c_j).

    c_j = [E(x_{j-2}) ; E(x_{j-1}) ; E(x_j)]. A begins at zero.

    Args:
        size: Width d of embeddings and states.
        trigram: False reads x_j alone: e_j = B E(x_j).
    """

    def __init__(self, size: int, trigram: bool = True) -> None:
        super().__init__()
        self.tokens = 3 if trigram else 1
        self.mix = nn.Linear(self.tokens * size, self.tokens * size) if trigram else None
        if self.mix is not None:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)
        self.project = nn.Linear(self.tokens * size, size, bias=False)

    def forward(self, embedded: Tensor) -> Tensor:
        """Encode as e (..., d) the embeddings (..., 3, d) of three tokens."""
        c = embedded[..., -self.tokens :, :].flatten(-2)
        u = c if self.mix is None else c + F.silu(self.mix(c))
        return self.project(u)  # type: ignore[no-any-return]


class Branches:
    """Drafts from all positions of a text at once, level by level and with gradients, as training needs it.

    The branch at position t sees h_0 .. h_t and itself. What is fed on is detached.

    Args:
        context: The context encoder.
        states: The target's, h (batch, length, d).
        first: The first position with a branch.
    """

    def __init__(self, context: DraftLayer, states: Tensor, first: int) -> None:
        self.context = context
        self.cache = DynamicCache()
        # What goes into the cache next, which slots it sees, its positions; and which of it the next level hangs from.
        length = states.shape[1]
        self.fed = states
        self.seen = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        self.positions = torch.arange(length, device=states.device)
        self.parents = slice(first, None)

    def grow(self, e: Tensor) -> Tensor:
        """Draft a level: g (batch, count, d) of the first `count` branches' next tokens, from their e."""
        count = e.shape[1]
        own = torch.eye(count, dtype=torch.bool, device=e.device)
        seen = torch.cat([self.seen[self.parents][:count], own], dim=1)
        positions = self.positions[self.parents][:count] + 1
        # The slots of e are given up after the pass, and taken by g in the next.
        mask = torch.cat([F.pad(self.seen, (0, count)), seen])
        g = self.context.attend(
            torch.cat([self.fed, e], dim=1), mask[None], torch.cat([self.positions, positions])[None], self.cache
        )[:, -count:]
        self.cache.crop(-count)
        self.fed, self.seen, self.positions, self.parents = g.detach(), seen, positions, slice(0, None)
        return g


class Chimera(Drafter):
    """A small draft network that, unlike independent heads, sees every earlier token at every drafted one.

    For a drafted token x_j a trigram encoder makes e_j from the token and the two before it. One layer of the target's
    architecture, the context encoder, reads [h_0 .. h_t ; g_{t+1} .. g_{j-1} ; e_j], which are the target's states of all
    verified tokens, its own output for each drafted ancestor of x_j, and e_j; its output there is g_j, an estimate of
    h_j. Head k predicts x_{t+2+k} from [h_t ; g_{t+1+k}].

    Make one with `Chimera.from_target(model)`, train it with `paperworks.decoding.train_drafter`, and pass it to
    `generate(model, ids, drafter=...)`.

    Args:
        target: The model to draft for.
        heads: Decoding heads K; the tree is at most K deep.
        trigram: Read three tokens; else the drafted token alone, through a linear map.
        context_layers: Layers over all earlier states; 0 leaves them out (g = e).
        residual_heads: Heads read the last verified state too, and not g alone.
        tie_lm_head: Head k scores with the target's frozen head W after a map M_k of [h ; g] to d dimensions, which begins
            at [I, I]. Else, as the paper has it, with a trained matrix C_k of its own, which begins at [W, W]: d times the
            vocabulary twice for each head.
        vocabulary: Draft only these tokens (ids), or None for all. Fewer are much cheaper to score, and verification
            keeps the output the same.
        tree: Paths of the tree, see `TreeShape`; as many nodes at each depth as the published tree has by default (4, 8,
            8, 3 and, given five heads, 2).
        own_tokens: In training, deeper levels read the tokens that the heads before them would draft; else the text's.
        label_weight: Weight of the cross-entropy with the text.
        distil_weight: Weight of distillation, lambda.
        distil_on: `hidden`: the mean squared distance of g_{t+1} from h_{t+1}. `logits`: each head's cross-entropy with the
            target's distribution.
        memoise: Keep each trigram's e for the rest of a generation. It saves work where texts repeat themselves, costs d
            numbers a trigram, and makes a GPU wait at each level.

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
        >>> chimera = Chimera.from_target(model)
        >>> from paperworks.decoding import generate
        >>> result = generate(model, torch.tensor([[1, 2, 3]]), drafter=chimera, max_new_tokens=8, eos_token_id=[])
        >>> plain = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=8, eos_token_id=[])
        >>> bool((result.sequences == plain.sequences).all())
        True
    """

    vocabulary: Tensor | None
    embedding_scale: Tensor

    def __init__(
        self,
        target: Target,
        *,
        heads: int = 4,
        trigram: bool = True,
        context_layers: int = 1,
        residual_heads: bool = True,
        tie_lm_head: bool = True,
        vocabulary: Tensor | None = None,
        tree: Sequence[Sequence[int]] | None = None,
        own_tokens: bool = True,
        label_weight: float = 1.0,
        distil_weight: float = 1.0,
        distil_on: str = "hidden",
        memoise: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if context_layers < 0:
            raise ValueError(f"context_layers must not be negative, got {context_layers}")
        if distil_on not in ("hidden", "logits"):
            raise ValueError(f"distil_on must be hidden or logits, got {distil_on!r}")
        if min(label_weight, distil_weight) < 0 or label_weight + distil_weight * (distil_on == "logits") == 0:
            raise ValueError(
                f"the heads learn nothing from label_weight={label_weight} and distil_weight={distil_weight} on "
                f"{distil_on}: give label_weight, or distil_weight on logits, a positive value, and none a negative one"
            )
        size = target.hidden_size
        self.options: dict[str, Any] = {
            "trigram": trigram,
            "context_layers": context_layers,
            "residual_heads": residual_heads,
            "tie_lm_head": tie_lm_head,
            "own_tokens": own_tokens,
            "label_weight": label_weight,
            "distil_weight": distil_weight,
            "distil_on": distil_on,
            "memoise": memoise,
        }
        target.check_states()
        self.register_buffer("vocabulary", vocabulary)
        self.scored = target.vocab_size if vocabulary is None else len(vocabulary)
        # Embeddings are an order of magnitude smaller than states; a constant that the encoder could take in brings them
        # to unit size, so that both train at one learning rate.
        embeddings = target.embed(torch.arange(target.vocab_size, device=target.device)[:4096])
        self.register_buffer("embedding_scale", embeddings.float().pow(2).mean().rsqrt())
        self.encoder = TrigramEncoder(size, trigram)
        self.context = DraftLayer(target, context_layers) if context_layers else None
        # C_k [h ; g] in two parts, as h is the same for all nodes of a tree.
        start = torch.eye(size) if tie_lm_head else target.head_rows(vocabulary)
        self.heads = nn.ModuleList(_linear(start) for _ in range(heads))
        self.residual = nn.ModuleList(_linear(start) for _ in range(heads)) if residual_heads else None
        self.tree = TreeShape(tree if tree is not None else _widest(_PUBLISHED[:heads], ranks=4))

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
        # What the context encoder reads at each level: the nodes with children, down to that depth.
        inner = {path[:-1] for path in tree.paths} - {()}
        self._inner = [TreeShape([path for path in inner if len(path) <= depth]) for depth in range(tree.depth)]

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; the vocabulary by its size, its ids being among the weights."""
        return {
            "heads": len(self.heads),
            "vocabulary": None if self.vocabulary is None else len(self.vocabulary),
            "tree": [list(path) for path in self.tree.paths],
            **self.options,
        }

    @dataclass
    class State:
        """Of one generation.

        Attributes:
            target: The target.
            scorer: Its head for the tokens drafted; None if the heads score by themselves.
            cache: The context encoder's.
            last: Each row's last two verified tokens, (batch, 2); -1 before the text's start.
            known: e of the trigrams met.
        """

        target: Target
        scorer: Head | None
        cache: TreeCache | None
        last: Tensor
        known: dict[tuple[int, int, int], Tensor] | None = None

    def start(self, target: Target, batch: int, sampling: Sampling) -> State:
        """Look up what of the target's head scores drafts, and open a cache."""
        return self.State(
            target,
            target.scorer(self.vocabulary) if self.options["tie_lm_head"] else None,
            self.context.new_cache(batch) if self.context is not None else None,
            torch.full((batch, 2), -1, device=target.device),
            {} if self.options["memoise"] else None,
        )

    def propose(
        self, state: State, committed: Committed, root: Tensor, generator: torch.Generator | None = None
    ) -> TokenTree:
        """Fill the tree level by level: e, then g of each node that has children, then the best ranks of its head."""
        if not self.tree.levels:
            return TokenTree.chain(root[:, None])
        lengths = torch.tensor(committed.lengths, device=root.device)[:, None]
        both = torch.arange(2, device=root.device)
        state.last = torch.cat([state.last, committed.tokens], dim=1).gather(1, lengths + both)
        # The two verified tokens, then the tree.
        tokens = F.pad(torch.cat([state.last, root[:, None]], dim=1), (0, len(self.tree) - 1))
        h = committed.last_hidden[:, None]
        drafted = h[:, :0]
        for head, level in enumerate(self.tree.levels):
            paths = level.paths.to(root.device)
            trigrams = tokens[:, torch.cat([both.expand(len(paths), -1), 2 + paths], dim=1)[:, -3:]]
            g = self._encoded(state.target, trigrams, h.dtype, state.known)
            if self.context is not None:
                assert state.cache is not None
                if head == 0:
                    g = self._behind(committed, g, state.cache)
                else:
                    sequence = torch.cat([drafted, g], dim=1)
                    tree = self._inner[head].tree(tokens[:, : sequence.shape[1]])
                    g = self.context.extend(sequence, tree, state.cache)[:, drafted.shape[1] :]
                drafted = torch.cat([drafted, g], dim=1)
            best = self._logits(head, h, g, state.scorer).topk(level.width).indices
            children = best[:, level.owners.to(root.device), level.ranks.to(root.device)]
            if self.vocabulary is not None:
                children = self.vocabulary[children]
            first = 2 + level.first_child
            tokens[:, first : first + children.shape[1]] = children
        return self.tree.tree(tokens[:, 2:])

    def _behind(self, committed: Committed, e: Tensor, cache: TreeCache) -> Tensor:
        """Read the root's g, in one pass with the target's new states, which alone stay in the cache."""
        assert self.context is not None
        end = torch.tensor(committed.lengths, device=e.device)[:, None, None].expand(e.shape)
        sequence = F.pad(committed.hidden, (0, 0, 0, 1)).scatter(1, end, e)
        line = torch.arange(sequence.shape[1], device=e.device).expand(sequence.shape[:2])
        output = self.context.extend(sequence, TokenTree.chain(line), cache)
        cache.commit(line, committed.lengths)
        return output.gather(1, end)

    def _encoded(
        self,
        target: Target,
        trigrams: Tensor,
        dtype: torch.dtype,
        known: dict[tuple[int, int, int], Tensor] | None = None,
    ) -> Tensor:
        """Encode as e (..., d) the `trigrams` (..., 3), looked up in and added to `known` where it is given."""
        if known is None:
            # Of a window that begins before the text (-1), its tokens come first and the last is repeated.
            shift = (trigrams < 0).sum(-1, keepdim=True) + torch.arange(3, device=trigrams.device)
            embedded = target.embed(trigrams.gather(-1, shift.clamp(max=2))) * self.embedding_scale
            encoded: Tensor = self.encoder(embedded.to(dtype))
            return encoded
        keys = [(first, second, third) for first, second, third in trigrams.reshape(-1, 3).tolist()]
        if missing := list(dict.fromkeys(key for key in keys if key not in known)):
            fresh = self._encoded(target, torch.tensor(missing, device=trigrams.device), dtype)
            known.update(zip(missing, fresh, strict=True))
        return torch.stack([known[key] for key in keys]).view(*trigrams.shape[:-1], -1)

    def _logits(self, head: int, h: Tensor, g: Tensor, scorer: Head | None) -> Tensor:
        """C_k [h ; g]."""
        u: Tensor = self.heads[head](g)
        if self.residual is not None:
            u = u + self.residual[head](h)
        return u if scorer is None else scorer(u)

    def predictions(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Iterator[Prediction]:
        """What each head says at every position whose label may be used.

        Deeper levels read the true tokens before them; with `own_tokens`, in training, those that the heads drafted.
        """
        scorer = target.scorer(self.vocabulary) if self.options["tie_lm_head"] else None
        # Head i at position t predicts token t + 2 + i. Nothing is drafted before the first label is in reach, nor behind
        # position 0, whose next token has no real trigram.
        end = tokens.shape[1] - 2
        first = max(1, int(mask.any(0).int().argmax()) - 1 - len(self.heads))
        if first >= end:
            return
        trigrams = F.pad(tokens, (2, 0), value=-1).unfold(1, 3, 1)[:, first + 1 :]
        branches = Branches(self.context, hidden[:, :end], first) if self.context is not None else None
        for i in range(min(len(self.heads), end - first)):
            label, count = first + 2 + i, end - first - i
            g = self._encoded(target, trigrams[:, :count], hidden.dtype)
            if branches is not None:
                g = branches.grow(g)
            labelled = mask[:, label:]
            state = g[labelled]
            logits = self._logits(i, hidden[:, first : first + count][labelled], state, scorer)
            yield Prediction(
                logits=logits,
                labels=tokens[:, label:][labelled],
                positions=labelled.nonzero() + torch.tensor([0, label - 1], device=tokens.device),
                state=state,
            )
            following = tokens[:, label:]
            if self.training and self.options["own_tokens"]:
                best = logits.argmax(-1)
                following = following.masked_scatter(
                    labelled, best if self.vocabulary is None else self.vocabulary[best]
                )
            trigrams = torch.cat([trigrams[:, :count, 1:], following[..., None]], dim=-1)

    def loss(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Sum over heads of the cross-entropies, plus the distance of g_{t+1} from h_{t+1} if that is distilled."""
        weight, on_hidden = self.options["distil_weight"], self.options["distil_on"] == "hidden"
        predictions = self.predictions(target, tokens, hidden, mask)
        total = hidden.new_zeros((), dtype=torch.float32)
        if on_hidden and (nearest := next(predictions, None)) is not None:
            predictions = chain([nearest], predictions)
            if len(nearest.labels):
                row, index = nearest.positions.T
                total = weight * F.mse_loss(nearest.state.float(), hidden[row, index].float())
        return total + distillation_loss(
            predictions,
            target,
            hidden,
            self.vocabulary,
            label_weight=self.options["label_weight"],
            teacher_weight=0.0 if on_hidden else weight,
            state_weight=0.0,
        )


def _linear(weight: Tensor) -> nn.Linear:
    """A linear map without bias that begins at `weight`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return layer


def _widest(counts: Sequence[int], ranks: int) -> list[tuple[int, ...]]:
    """The paths with the smallest sums of ranks, `counts[d]` of them at depth d, each below one that is kept."""
    levels: list[list[tuple[int, ...]]] = [[()]]
    for count in counts:
        children = [(*path, rank) for path in levels[-1] for rank in range(ranks)]
        levels.append(sorted(children, key=lambda path: (sum(path), path))[:count])
    return [path for level in levels[1:] for path in level]
