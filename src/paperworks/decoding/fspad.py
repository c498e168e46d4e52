"""FSPAD: a draft layer over token-specific features, its logits freed from them (arXiv 2408.15562), and EAGLE-2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.draft_layer import DraftLayer
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Head, Target
from paperworks.decoding.training import Prediction, distillation_loss
from paperworks.decoding.tree import TokenTree


class FeatureSampling(nn.Module):
    """The part of a feature that belongs to the token really sampled: s = D((U f) * gate(G e)), plus f itself.

    A feature f holds the whole law of the next token. It is spread over more dimensions than it has, the embedding e of
    the token that was drawn selects among them, and what is left is brought back.

    Args:
        size: Width d of features and embeddings.
        expanded: Width m of the space in between.
        gate: `silu` or `sigmoid`.
        residual: Add f, and begin with D = 0, at which the block changes nothing.
    """

    gates: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {"silu": F.silu, "sigmoid": torch.sigmoid}

    def __init__(self, size: int, expanded: int, gate: str = "silu", residual: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(size, expanded, bias=False)
        self.select = nn.Linear(size, expanded, bias=False)
        self.down = nn.Linear(expanded, size, bias=False)
        self.gate, self.residual = self.gates[gate], residual
        if residual:
            nn.init.zeros_(self.down.weight)

    def forward(self, features: Tensor, embedded: Tensor) -> Tensor:
        """Features (..., d) made specific to the tokens whose embeddings are `embedded` (..., d)."""
        sampled: Tensor = self.down(self.up(features) * self.gate(self.select(embedded)))
        return features + sampled if self.residual else sampled


class FeatureLayer(DraftLayer):
    """EAGLE's decoder layer: no norm before its attention, where the architecture has one."""

    def __init__(self, target: Target, layers: int = 1) -> None:
        super().__init__(target, layers)
        first = self.layers[0]
        for name in ("input_layernorm", "ln_1", "self_attn_layer_norm", "attention_layernorm", "layernorm1"):
            if hasattr(first, name):
                setattr(first, name, nn.Identity())


class FSPAD(Drafter):
    """A draft layer that continues the target's features, and EAGLE-2's dynamic tree of what it says.

    At position t the layer reads z_t = Linear([e ; s]): the embedding e of the token x_{t+1} that was sampled, and the
    target's last state f_t made specific to it by feature sampling. From its output o_t come the logits W o_t of the
    token x_{t+2}, W being the target's frozen head, and, by partial alignment, a separate estimate A o_t of the feature
    f_{t+1}. Only that one is pulled towards the target's feature and fed on to draft deeper, so that matching features
    and being sure of tokens no longer compete for one vector.

    A step drafts `depth` levels, each by one pass over the `top_k` nodes of highest confidence (product of draft
    probabilities from the root), and keeps the `nodes` most confident of all that it met.

    `feature_sampling=False, partial_alignment=False` is EAGLE-2 (arXiv 2406.16858), the paper's baseline. The paper
    describes both parts in words; their exact form here is this library's reading.

    Args:
        target: The model to draft for.
        layers: Decoder layers of the drafter.
        feature_sampling: Make features specific to the sampled token.
        fs_expand: Width of the space in which they are sampled, in units of d; rounded to a multiple of 64.
        fs_gate: `silu` or `sigmoid`.
        fs_residual: Add the feature itself to the sampled one.
        partial_alignment: Give the fed-on feature a projection of its own.
        nodes: Drafted tokens a step; 60 for a 7B target, 50 from 13B on. With 0 nothing is drafted.
        depth: Levels of the tree, each costing one pass of the draft layer.
        top_k: Nodes expanded at each level, and children tried for each.
        vocabulary: Draft only these tokens (ids), or None for all. Fewer are much cheaper to score, and verification
            keeps the output the same.
        state_weight: Weight of the smooth L1 distance between estimated and true features.
        teacher_weight: Weight of the cross-entropy with the target's distribution.
        noise: Training features get uniform noise of up to noise * 512 / length either way.

    Raises:
        ValueError: an argument out of range.
        TypeError, ValueError: a model that cannot be a `Target`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> drafter = FSPAD.from_target(model, nodes=8, depth=3, top_k=4).eval()
        >>> from paperworks.decoding import generate
        >>> result = generate(model, torch.tensor([[1, 2, 3]]), drafter=drafter, max_new_tokens=8, eos_token_id=[])
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
        layers: int = 1,
        feature_sampling: bool = True,
        fs_expand: float = 4.0,
        fs_gate: str = "silu",
        fs_residual: bool = True,
        partial_alignment: bool = True,
        nodes: int = 60,
        depth: int = 6,
        top_k: int = 10,
        vocabulary: Tensor | None = None,
        state_weight: float = 1.0,
        teacher_weight: float = 0.1,
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("layers", layers, 1),
            ("nodes", nodes, 0),
            ("depth", depth, 1),
            ("top_k", top_k, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if fs_gate not in FeatureSampling.gates:
            raise ValueError(f"fs_gate must be one of {', '.join(FeatureSampling.gates)}, got {fs_gate!r}")
        if fs_expand <= 0:
            raise ValueError(f"fs_expand must be positive, got {fs_expand}")
        if min(state_weight, teacher_weight, noise) < 0 or state_weight + teacher_weight == 0:
            raise ValueError("loss weights and noise must not be negative, and one of the weights must be positive")
        size = target.hidden_size
        self.nodes, self.depth, self.top_k = nodes, depth, top_k
        self.options: dict[str, Any] = {
            "layers": layers,
            "feature_sampling": feature_sampling,
            "fs_expand": fs_expand,
            "fs_gate": fs_gate,
            "fs_residual": fs_residual,
            "partial_alignment": partial_alignment,
            "state_weight": state_weight,
            "teacher_weight": teacher_weight,
            "noise": noise,
        }
        target.check_states()
        self.register_buffer("vocabulary", vocabulary)
        # Embeddings are an order of magnitude smaller than features; a constant that the linear layer could take in
        # brings them to unit size, so that both train at one learning rate.
        embeddings = target.embed(torch.arange(target.vocab_size, device=target.device)[:4096])
        self.register_buffer("embedding_scale", embeddings.float().pow(2).mean().rsqrt())
        self.sampling = (
            FeatureSampling(size, max(1, round(fs_expand * size / 64)) * 64, fs_gate, fs_residual)
            if feature_sampling
            else None
        )
        self.join = nn.Linear(2 * size, size)
        # From "the next feature is this one": a random mixture would first have to be unlearnt.
        nn.init.zeros_(self.join.bias)
        self.join.weight.data = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1)
        self.layer = FeatureLayer(target, layers)
        self.align = nn.Linear(size, size, bias=False) if partial_alignment else None
        if self.align is not None:
            nn.init.eye_(self.align.weight)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; the vocabulary by its size, its ids being among the weights."""
        return {
            "nodes": self.nodes,
            "depth": self.depth,
            "top_k": self.top_k,
            "vocabulary": None if self.vocabulary is None else len(self.vocabulary),
            **self.options,
        }

    class State(NamedTuple):
        """Of one generation: the target, its head for the tokens drafted, and the draft layer's cache."""

        target: Target
        scorer: Head
        cache: TreeCache

    def start(self, target: Target, batch: int, sampling: Sampling) -> State:
        """Look up what of the target's head scores drafts, and open a cache."""
        return self.State(target, target.scorer(self.vocabulary), self.layer.new_cache(batch))

    def propose(
        self, state: State, committed: Committed, root: Tensor, generator: torch.Generator | None = None
    ) -> TokenTree:
        """Catch up with the target's features, then grow the tree level by level and keep its best nodes."""
        if not self.nodes:
            return TokenTree.chain(root[:, None])
        target, scorer, cache = state
        # Each feature goes with the token after it; behind a row's last one comes the root.
        ends = torch.tensor(committed.lengths, device=root.device).clamp(min=1)[:, None] - 1
        following = committed.tokens.roll(-1, dims=1).scatter(1, ends, root[:, None])
        joined = self._joined(target, committed.hidden, following)
        output = committed._replace(hidden=self.layer.append(joined, committed.lengths, cache)).last_hidden[:, None]

        kept = cache.lengths[:]
        behind = torch.tensor(kept, device=root.device)[:, None]
        slots = torch.arange(max(kept) + self.depth * self.top_k, device=root.device)
        seen = (slots < behind)[:, None]
        # All nodes met after the root: their tokens, parents (the root is 0) and log confidences, level by level.
        tokens: list[Tensor] = []
        parents: list[Tensor] = []
        confidences: list[Tensor] = []
        expanded, confidence = torch.zeros_like(behind), torch.zeros_like(behind)
        met, drafted = 1, 0
        for depth in range(self.depth):
            law = scorer(output)
            law = (law if law.dtype == torch.float64 else law.float()).log_softmax(-1)
            chances, best = law.topk(min(self.top_k, law.shape[-1]))
            tokens.append((best if self.vocabulary is None else self.vocabulary[best]).flatten(1))
            parents.append(expanded.repeat_interleave(best.shape[2], dim=1))
            confidences.append((confidence[..., None] + chances).flatten(1))
            if depth == self.depth - 1:
                break
            confidence, chosen = confidences[-1].topk(min(self.top_k, confidences[-1].shape[1]))
            owner = (chosen // best.shape[2])[..., None]
            expanded, met = met + chosen, met + confidences[-1].shape[1]
            features = self._feature(output).gather(1, owner.expand(-1, -1, output.shape[2]))
            # Nodes attend to what their parents do and to themselves.
            own = behind + torch.arange(drafted, drafted + chosen.shape[1], device=root.device)
            seen = seen.gather(1, owner.expand(-1, -1, len(slots))).scatter(2, own[..., None], True)
            drafted += chosen.shape[1]
            output = self.layer.attend(
                self._joined(target, features, tokens[-1].gather(1, chosen)),
                seen[..., : max(kept) + drafted],
                (behind + depth).expand_as(chosen),
                cache,
            )
            cache.lengths[:] = [length + drafted for length in kept]
        cache.lengths[:] = kept
        return _most_confident(
            root, torch.cat(tokens, dim=1), torch.cat(parents, dim=1), torch.cat(confidences, dim=1), self.nodes
        )

    def _joined(self, target: Target, features: Tensor, tokens: Tensor) -> Tensor:
        """What the draft layer reads: features, made specific to the tokens sampled from them, and those tokens."""
        embedded = (target.embed(tokens) * self.embedding_scale).to(features.dtype)
        if self.sampling is not None:
            features = self.sampling(features, embedded)
        joined: Tensor = self.join(torch.cat([embedded, features], dim=-1))
        return joined

    def _feature(self, output: Tensor) -> Tensor:
        """The estimate of the target's next feature, which is matched in training and fed on in drafting."""
        return output if self.align is None else self.align(output)

    def predictions(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Iterator[Prediction]:
        """What one pass of the draft layer says at every position whose label may be used: a single depth."""
        # Position t reads feature t and token t + 1; its label is token t + 2.
        features, labelled = hidden[:, :-2], mask[:, 2:]
        if not bool(labelled.any()):
            return
        if self.training and self.options["noise"]:
            span = self.options["noise"] * 512 / hidden.shape[1]
            features = features + span * (2 * torch.rand_like(features) - 1)
        output = self.layer(self._joined(target, features, tokens[:, 1:-1]))[labelled]
        yield Prediction(
            logits=target.logits(output, self.vocabulary),
            labels=tokens[:, 2:][labelled],
            positions=labelled.nonzero() + torch.tensor([0, 1], device=tokens.device),
            state=self._feature(output),
        )

    def loss(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Weighted sum of the feature loss and the logit loss, averaged over positions."""
        return distillation_loss(
            self.predictions(target, tokens, hidden, mask),
            target,
            hidden,
            self.vocabulary,
            label_weight=0.0,
            teacher_weight=self.options["teacher_weight"],
            state_weight=self.options["state_weight"],
        )


def _most_confident(root: Tensor, tokens: Tensor, parents: Tensor, confidences: Tensor, count: int) -> TokenTree:
    """The tree of the root and the `count` most confident nodes, of nodes listed level by level.

    A child is at most as confident as its parent, which comes first where they are equal: parents are always kept.
    """
    order = confidences.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    place = torch.zeros(len(root), 1 + tokens.shape[1], dtype=torch.long, device=root.device)
    place.scatter_(1, 1 + order, torch.arange(1, 1 + order.shape[1], device=root.device).expand_as(order))
    kept = place.gather(1, parents.gather(1, order))
    return TokenTree(
        torch.cat([root[:, None], tokens.gather(1, order)], dim=1),
        torch.cat([torch.full_like(root[:, None], -1), kept], dim=1),
    )
