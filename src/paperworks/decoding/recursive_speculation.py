"""Recursive speculative decoding (arXiv 2402.14160): trees of drafts sampled without replacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from paperworks.decoding.draft_model import DraftModel, first_layers
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.sampling import Sampling, draw
from paperworks.decoding.target import Target
from paperworks.decoding.training import Prediction, distillation_loss
from paperworks.decoding.tree import Draw, TokenTree


def gumbel_top_k(log_p: Tensor, k: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draw k of n without replacement: the k largest of log p + Gumbel noise.

    Read from left to right the draws come one after the other: the first from p, the second from p without the first,
    and so on (arXiv 1903.06059).

    Args:
        log_p: Log-probabilities, (..., n), up to a constant each; -inf is never drawn while others are left.
        k: How many to draw; all n where there are fewer.
        generator: Source of randomness.

    Returns:
        The perturbed log-probabilities in descending order and the indices drawn, both (..., min(k, n)).

    Example:
        >>> perturbed, index = gumbel_top_k(torch.tensor([0.0, -torch.inf, 0.0]), 3)
        >>> int(index[2]), float(perturbed[2])
        (1, -inf)
    """
    noise = torch.empty_like(log_p).exponential_(generator=generator).log().neg()
    best = (log_p + noise).topk(min(k, log_p.shape[-1]), dim=-1)
    return best.values, best.indices


def truncate_gumbels(perturbed: Tensor, maximum: Tensor) -> Tensor:
    """Gumbels `perturbed` (..., k), given that the largest, which comes first, is `maximum` (...).

    -log(exp(-G) - exp(-Z) + exp(-g)) with G the wanted and Z the present maximum, in a form that does not overflow.

    Example:
        >>> truncate_gumbels(torch.tensor([2.0, 1.0, -torch.inf]), torch.tensor(-3.0)).tolist()
        [-3.0, -3.0115110874176025, -inf]
    """
    v = maximum[..., None] - perturbed + torch.log1p(-(perturbed - perturbed[..., :1]).exp())
    truncated = maximum[..., None] - v.relu() - v.abs().neg().exp().log1p()
    return truncated.masked_fill(perturbed == -torch.inf, -torch.inf)


class Level(NamedTuple):
    """Nodes of one depth of a growing tree, each tensor of shape (batch, width).

    Attributes:
        tokens: Their tokens.
        owners: Which node of the depth above each was drawn from.
        log_p: Log-probability of the whole path, float64; -inf is padding.
        perturbed: The path's Gumbel G, float64.
    """

    tokens: Tensor
    owners: Tensor
    log_p: Tensor
    perturbed: Tensor

    def children(self, log_p: Tensor, k: int, greedy: bool, generator: torch.Generator | None) -> Level:
        """The k children of each node, whose continuations have `log_p` (batch, width, n): (batch, width, k) a part.

        Drawn without replacement, in the order of the draws; or, if `greedy`, the k most likely.
        """
        if greedy:
            perturbed, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
        else:
            perturbed, tokens = gumbel_top_k(log_p, k, generator)
        owners = torch.arange(tokens.shape[1], device=tokens.device)[:, None].expand_as(tokens)
        path = self.log_p[..., None]
        return Level(tokens, owners, path + log_p.gather(-1, tokens), path + perturbed)


@dataclass(frozen=True)
class ConstantBranching:
    """RSD-C: every node at depth l gets `branching[l]` children by Gumbel-top-k; (1, 1, 1) is a single sequence.

    Example:
        >>> ConstantBranching((2, 2, 1)).depth
        3
    """

    branching: tuple[int, ...]
    draw: ClassVar[Draw] = "without_replacement"

    def __post_init__(self) -> None:
        object.__setattr__(self, "branching", tuple(self.branching))
        _check_sizes(branching=self.branching)

    @property
    def depth(self) -> int:
        """Levels of drafted tokens."""
        return len(self.branching)

    def grow(self, level: Level, depth: int, log_p: Tensor, greedy: bool, generator: torch.Generator | None) -> Level:
        """Give every node of `level`, whose continuations have `log_p` (batch, width, n), its children."""
        return Level(*(part.flatten(1) for part in level.children(log_p, self.branching[depth], greedy, generator)))


@dataclass(frozen=True)
class _Sequences:
    width: int
    depth: int

    def __post_init__(self) -> None:
        _check_sizes(width=(self.width,), depth=(self.depth,))


class StochasticBeam(_Sequences):
    """RSD-S: stochastic beam search keeps at each depth the `width` sequences with the largest Gumbels.

    Children of a node are ordered by their Gumbels; that order makes which child comes next independent of how many
    were kept.

    Example:
        >>> StochasticBeam(width=3, depth=4)
        StochasticBeam(width=3, depth=4)
    """

    draw: ClassVar[Draw] = "without_replacement"

    def grow(self, level: Level, depth: int, log_p: Tensor, greedy: bool, generator: torch.Generator | None) -> Level:
        """Keep the best of all children of `level`, whose continuations have `log_p` (batch, width, n)."""
        # No node can place more than `width` children, so its best are enough. Without noise this is beam search.
        children = level.children(log_p, self.width, greedy, generator)
        if not greedy:
            children = children._replace(perturbed=truncate_gumbels(children.perturbed, level.perturbed))
        best = children.perturbed.flatten(1).topk(min(self.width, children.tokens[0].numel()), dim=-1).indices
        return Level(*(part.flatten(1).gather(1, best) for part in children))


class IndependentSequences(_Sequences):
    """The baseline: `width` independent sequences, as in SpecTr and SpecInfer; siblings may repeat.

    Sequences that begin alike share the first one's nodes. A repeated sibling stays in the tree, childless: it can only
    be rejected, but recursive rejection with replacement counts it as a draw.

    Example:
        >>> IndependentSequences(width=3, depth=4)
        IndependentSequences(width=3, depth=4)
    """

    draw: ClassVar[Draw] = "with_replacement"

    def grow(self, level: Level, depth: int, log_p: Tensor, greedy: bool, generator: torch.Generator | None) -> Level:
        """Draw one token behind each sequence, whose continuations have `log_p` (batch, width, n)."""
        alike = (level.tokens[:, :, None] == level.tokens[:, None]) & (
            level.owners[:, :, None] == level.owners[:, None]
        )
        owners = alike.int().argmax(-1).expand(-1, self.width)
        law = log_p.gather(1, owners[..., None].expand(-1, -1, log_p.shape[-1]))
        tokens = law.argmax(-1) if greedy else draw(law.exp(), generator)
        chance = torch.zeros_like(tokens, dtype=torch.float64)
        return Level(tokens, owners, chance, chance)


TreeSampler = ConstantBranching | StochasticBeam | IndependentSequences
_SAMPLERS: dict[str, Any] = {
    sampler.__name__: sampler for sampler in (ConstantBranching, StochasticBeam, IndependentSequences)
}


def _check_sizes(**sizes: tuple[int, ...]) -> None:
    for name, values in sizes.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be at least 1 everywhere, got {values}")


class RecursiveSpeculation(Drafter):
    """Trees of drafts sampled without replacement, verified by recursive rejection.

    Siblings are drawn from the draft's law one without the other, so that no verification is spent on a duplicate. With
    the engine's acceptance `Exact` (its default above temperature 0) the text follows the target's law exactly. Draft
    and target are warped alike by temperature, top-k and top-p. At temperature 0 the noise is left out: top-k children,
    or beam search, of the draft.

    `paperworks.decoding.train_drafter` distils the target into the draft model, which a draft cut out of the target
    needs and any other may profit from.

    Args:
        target: The model to draft for.
        draft: The draft model: a smaller transformers causal LM with the target's tokenizer, on its device; or a number
            of layers, for a copy of the target's first ones (see `first_layers`).
        tree: `StochasticBeam` (RSD-S; three sequences of four tokens by default), `ConstantBranching` (RSD-C), or the
            baseline `IndependentSequences`.
        vocabulary: Draft only these tokens (ids), or None for all. Fewer are much cheaper to score, and verification
            keeps the output the same.

    Raises:
        TypeError: `draft` is no causal LM.
        ValueError: a draft of another vocabulary or on another device, or a number of layers that the target cannot give.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> drafter = RecursiveSpeculation.from_target(model, draft=1, tree=StochasticBeam(width=3, depth=2))
        >>> from paperworks.decoding import generate
        >>> result = generate(
        ...     model, torch.tensor([[1, 2, 3]]), drafter=drafter, max_new_tokens=8, temperature=1.0, eos_token_id=[]
        ... )
        >>> result.sequences.shape, result.statistics.accepted_per_call > 1
        (torch.Size([1, 11]), True)
    """

    vocabulary: Tensor | None

    def __init__(
        self,
        target: Target,
        *,
        draft: nn.Module,
        tree: TreeSampler | None = None,
        vocabulary: Tensor | None = None,
    ) -> None:
        super().__init__()
        seen = Target(draft)
        if vocabulary is None and seen.vocab_size != target.vocab_size:
            raise ValueError(
                f"the draft scores {seen.vocab_size} tokens and the target {target.vocab_size}: both need one tokenizer; "
                "if they have it, and differ in padding only, give the number of common tokens as `vocabulary`"
            )
        if vocabulary is not None and int(vocabulary.max()) >= min(seen.vocab_size, target.vocab_size):
            raise ValueError(f"vocabulary holds token {int(vocabulary.max())}, which draft or target do not know")
        if seen.device != target.device:
            raise ValueError(f"the draft is on {seen.device} and the target on {target.device}: move it there")
        self.tree, self.draft = tree or StochasticBeam(width=3, depth=4), draft
        self.register_buffer("vocabulary", vocabulary)

    @classmethod
    def from_target(  # type: ignore[override]
        cls,
        model: nn.Module,
        *,
        draft: nn.Module | int | Mapping[str, Any],
        tree: TreeSampler | Mapping[str, Any] | None = None,
        vocabulary: Tensor | int | None = None,
    ) -> Self:
        """A drafter for `model`; a mapping stands for a draft (untrained) or a tree as in `config`."""
        target = Target(model)
        source: Any = draft
        sampler: Any = tree
        if isinstance(draft, int):
            source = first_layers(model, draft)
        elif isinstance(draft, Mapping):
            implementation = target.config._attn_implementation
            source = AutoModelForCausalLM.from_config(AutoConfig.for_model(**draft), attn_implementation=implementation)
            source = source.to(target.device, target.dtype).eval()
        if isinstance(tree, Mapping):
            sizes = dict(tree)
            sampler = _SAMPLERS[sizes.pop("sampler")](**sizes)
        if isinstance(vocabulary, int):
            vocabulary = torch.arange(vocabulary)
        if vocabulary is not None:
            vocabulary = vocabulary.to(target.device)
        return cls(target, draft=source, tree=sampler, vocabulary=vocabulary).belongs_to(model)

    @property
    def config(self) -> dict[str, Any]:
        """The draft model's configuration, the tree, and the vocabulary by its size; weights and ids are saved apart."""
        draft: Any = self.draft
        return {
            "draft": draft.config.to_dict(),
            "tree": {"sampler": type(self.tree).__name__, **asdict(self.tree)},
            "vocabulary": None if self.vocabulary is None else len(self.vocabulary),
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The draft's weights; those that it uses twice are copied, for a file holds each tensor by itself."""
        state = super().state_dict(*args, **kwargs)
        seen: set[int] = set()
        for name, tensor in state.items():
            state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
            seen.add(tensor.data_ptr())
        return state

    class State(NamedTuple):
        """Of one generation."""

        draft: DraftModel
        sampling: Sampling
        vocab_size: int

    def check_texts(self, lengths: list[int], new: int) -> None:
        """Raise ValueError for texts longer than the draft's context, where it would draft nonsense or fail."""
        draft, longest = Target(self.draft), max(lengths) + new
        if draft.context is not None and longest > draft.context:
            raise ValueError(
                f"a text may have {longest} tokens, but the draft model's context holds {draft.context}: lower "
                "max_new_tokens, or take a draft with a longer context"
            )
        draft.check_texts(lengths, new)

    def start(self, target: Target, batch: int, sampling: Sampling) -> State:
        """An empty cache for the draft model."""
        return self.State(DraftModel(self.draft, batch, self.vocabulary), sampling, target.vocab_size)

    def propose(
        self, state: State, committed: Committed, root: Tensor, generator: torch.Generator | None = None
    ) -> TokenTree:
        """Draw the tree depth by depth; the draft reads all nodes of a depth in one pass."""
        known = len(state.draft.embedding.weight)
        if known < state.vocab_size and (last := max(int(committed.tokens.max()), int(root.max()))) >= known:
            raise ValueError(
                f"the text holds token {last}, but the draft model knows only 0..{known - 1}: draft with a model of the "
                "target's tokenizer"
            )
        greedy = state.sampling.greedy
        warper = Sampling(temperature=1.0) if greedy else state.sampling
        nothing = torch.zeros(len(root), 1, dtype=torch.float64, device=root.device)
        level = Level(root[:, None], torch.full_like(root, -1)[:, None], nothing, nothing)
        tree, laws, first = TokenTree(level.tokens, level.owners), [], 0
        for depth in range(self.tree.depth):
            scores = state.draft.extend(tree, first) if depth else state.draft.read(committed, root)
            laws.append(warper.probabilities(scores))
            level = self.tree.grow(level, depth, laws[-1].double().log(), greedy, generator)
            if self.vocabulary is not None:
                level = level._replace(tokens=self.vocabulary[level.tokens])
            parents = (first + level.owners).masked_fill(level.log_p == -torch.inf, -1)
            first = tree.tokens.shape[1]
            tree = TokenTree(torch.cat([tree.tokens, level.tokens], 1), torch.cat([tree.parents, parents], 1))
        if greedy:
            return tree
        law = torch.cat(laws, dim=1)
        draft_probs = law.new_zeros(*tree.tokens.shape, state.vocab_size)
        draft_probs[:, : law.shape[1], slice(None) if self.vocabulary is None else self.vocabulary] = law
        return TokenTree(tree.tokens, tree.parents, draft_probs, self.tree.draw)

    def predictions(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Iterator[Prediction]:
        """What the draft model says at every position whose label may be used."""
        labelled = mask[:, 1:]
        if not bool(labelled.any()):
            return
        draft = Target(self.draft)
        state = draft.base(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[labelled]
        # With gradient, unlike `Target.logits`: the draft's head is trained too.
        weight, bias = draft.head.weight, getattr(draft.head, "bias", None)
        if self.vocabulary is not None:
            weight, bias = weight[self.vocabulary], None if bias is None else bias[self.vocabulary]
        scorer = replace(draft.scorer(self.vocabulary), weight=weight, bias=bias)
        yield Prediction(scorer(state), tokens[:, 1:][labelled], labelled.nonzero(), state)

    def loss(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of the draft's law with the target's, averaged over positions."""
        predictions = self.predictions(target, tokens, hidden, mask)
        return distillation_loss(
            predictions, target, hidden, self.vocabulary, label_weight=0.0, teacher_weight=1.0, state_weight=0.0
        )  # fmt: skip
