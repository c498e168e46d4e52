"""Draft models: a smaller causal LM reads a growing token tree level by level, with a cache of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paperworks.decoding.cache import TreeCache, layer_count
from paperworks.decoding.drafter import Committed
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree


class DraftModel(Target):
    """A draft model during one generation.

    Its cache holds the committed text, the root included; the nodes of the tree that grows lie behind it.

    Args:
        model: A causal LM with the target's tokenizer.
        batch: Rows.
        vocabulary: Score only these tokens (ids), or None for all.

    Raises:
        TypeError, ValueError: as for `Target`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> draft = DraftModel(LlamaForCausalLM(config), batch=1)
        >>> text = Committed(torch.tensor([[1, 2, 3]]), torch.zeros(1, 3, 32), [3])
        >>> with torch.no_grad():
        ...     behind_root = draft.read(text, torch.tensor([4]))
        ...     behind_nodes = draft.extend(TokenTree(torch.tensor([[4, 5, 6]]), torch.tensor([[-1, 0, 0]])), first=1)
        >>> behind_root.shape, behind_nodes.shape, draft.cache.lengths
        (torch.Size([1, 1, 50]), torch.Size([1, 2, 50]), [4])
    """

    def __init__(self, model: nn.Module, batch: int, vocabulary: Tensor | None = None) -> None:
        super().__init__(model)
        self.cache = TreeCache(self.config, batch)
        self.vocabulary = vocabulary
        self.score = None if vocabulary is None else self.scorer(vocabulary)
        self.forest: TokenTree | None = None

    def read(self, committed: Committed, root: Tensor) -> Tensor:
        """Read what was committed since the last call, and `root`; scores behind it, (batch, 1, vocab)."""
        if not any(self.cache.lengths):
            texts = zip(committed.tokens, committed.lengths, root, strict=True)
            logits, hidden = self.prefill([torch.cat([row[:n], last[None]]) for row, n, last in texts], self.cache)
            if self.score is None:
                return logits[:, None]
            ends = torch.tensor(committed.lengths, device=self.device)
            self.check_scorer(hidden[torch.arange(len(ends), device=self.device), ends], logits)
            return logits[:, None, self.vocabulary]
        # The cache ends with the old root, with which `committed` begins; of what follows it, nodes may be there too.
        known = self._keep(committed)
        rows = [
            torch.cat([row[1 + k : n], last[None]])
            for row, n, k, last in zip(committed.tokens, committed.lengths, known, root, strict=True)
        ]
        chain = TokenTree.chain(nn.utils.rnn.pad_sequence(rows, batch_first=True))
        scores = self._scores(chain, 0)
        line = torch.arange(chain.tokens.shape[1], device=root.device).expand_as(chain.tokens)
        self.cache.commit(line, [len(row) if n else 0 for row, n in zip(rows, committed.lengths, strict=True)])
        ends = torch.tensor([len(row) - 1 for row in rows], device=root.device)
        return scores[torch.arange(len(rows), device=root.device), ends][:, None]

    def extend(self, tree: TokenTree, first: int) -> Tensor:
        """Scores behind the nodes of `tree` from `first` on, (batch, nodes, vocab); those before have been read."""
        # Behind a cache that ends with the root, the nodes below it are a forest.
        self.forest = TokenTree(tree.tokens[:, 1:], (tree.parents[:, 1:] - 1).clamp(min=-1))
        return self._scores(self.forest, first - 1)

    def _scores(self, tree: TokenTree, known: int) -> Tensor:
        """Scores behind all nodes but the first `known`, which lie in the cache already; nothing is committed."""
        committed = self.cache.lengths[:]
        read = [length + known for length in committed]
        tokens = tree.tokens[:, known:]
        if self.ordered(max(committed) + tree.tokens.shape[1]):
            if not tree.is_chain:
                raise ValueError(
                    f"the draft, a {type(self.model).__name__}, tells places by where keys lie in its cache, and cannot "
                    "grow branches: draft one sequence, as ConstantBranching((1, 1, 1)) does"
                )
            # Read behind what was read before as if it were committed.
            self.cache.lengths[:] = read
            logits, hidden = self.read_on(tokens, self.cache)
            self.cache.lengths[:] = committed
            return logits if self.score is None else self.score(hidden)
        positions = torch.tensor(committed, device=self.device)[:, None] + tree.depths[:, known:]
        # A mask of its own for these nodes: some CUDA kernels of attention cannot read one that begins inside another.
        mask = self._mask(tree, committed, known)
        keep = 0 if self.score is None else torch.empty(0, dtype=torch.long, device=self.device)
        # New nodes go into the slots behind those read before, where the mask expects them.
        self.cache.lengths[:] = read
        logits, hidden = self._forward(tokens, self.cache, positions, mask, keep)
        self.cache.lengths[:] = committed
        return logits if self.score is None else self.score(hidden)

    def _keep(self, committed: Committed) -> list[int]:
        """Commit those nodes of the last tree that were read and then accepted; how many of each row."""
        lengths = torch.tensor(committed.lengths, device=self.device)
        path, node = [], torch.full_like(lengths, -1)
        if self.forest is not None:
            for place, token in enumerate(committed.tokens.T[1:], start=1):
                child = (self.forest.parents == node[:, None]) & (self.forest.tokens == token[:, None])
                node = torch.where(child.any(-1) & (place < lengths), child.int().argmax(-1), -2)
                path.append(node)
        if not path:
            return [0] * len(lengths)
        nodes = torch.stack(path, dim=1)
        counts: list[int] = (nodes >= 0).sum(1).tolist()
        self.cache.commit(nodes, counts)
        return counts


def first_layers(model: Any, layers: int) -> Any:
    """A causal LM made of copies of the first `layers` layers of `model`, of its embedding, its final norm and its head.

    Embedding and head are frozen. Before it is trained such a model drafts poorly, see `RecursiveSpeculation`.

    Raises:
        ValueError: a model that is no plain transformers causal LM, or a number out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> shallow = first_layers(model, 1)
        >>> len(shallow.model.layers), bool((shallow.lm_head.weight == model.lm_head.weight).all())
        (1, True)
    """
    target = Target(model)
    whole = layer_count(target.config)
    if not isinstance(model, PreTrainedModel) or model.config is not target.config:
        raise ValueError(f"cannot take the first layers of a {type(model).__name__}: give a draft model")
    if not 1 <= layers < whole:
        raise ValueError(f"a draft takes 1 to {whole - 1} of the target's {whole} first layers, got {layers}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    shallow = type(model)(config).to(target.device, target.dtype).eval()
    wanted = shallow.state_dict().keys()
    shallow.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in wanted})
    for module in (shallow.get_input_embeddings(), shallow.get_output_embeddings()):
        module.requires_grad_(False)
    return shallow
