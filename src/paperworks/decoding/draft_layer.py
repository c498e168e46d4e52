"""One decoder layer of the target's own architecture over vectors that a drafter makes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.target import Target, tree_mask
from paperworks.decoding.tree import TokenTree


class DraftLayer(nn.Module):
    """A freshly initialised layer of the target's class, with rotary positions, tree attention and a cache of its own.

    Args:
        target: Gives architecture and sizes; its weights are not copied.
        layers: How many layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
        ... )
        >>> layer = DraftLayer(Target(LlamaForCausalLM(config)))
        >>> layer(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, target: Target, layers: int = 1) -> None:
        super().__init__()
        config: Any = copy.deepcopy(target.config)
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, None
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * layers
        self.model = AutoModel.from_config(config, attn_implementation=target.config._attn_implementation)
        # States come in and go out as they are: no embedding before, no norm behind.
        self.model.set_input_embeddings(nn.Identity())
        self.model.norm = nn.Identity()
        self.by_kind = target.windowed

    def new_cache(self, batch: int) -> TreeCache:
        """An empty cache for `batch` rows."""
        return TreeCache(self.model.config, batch)

    def forward(self, states: Tensor) -> Tensor:
        """Causal pass over whole sequences (batch, length, d), as in training."""
        output: Tensor = self.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return output

    def extend(self, states: Tensor, tree: TokenTree, cache: TreeCache) -> Tensor:
        """Pass over the nodes of `tree`, whose vectors are `states` (batch, nodes, d), behind what `cache` holds.

        Nothing is committed to the cache.
        """
        behind = torch.tensor(cache.lengths, device=states.device)[:, None]
        return self._pass(states, tree_mask(tree, cache.lengths, states.dtype), behind + tree.depths, cache)

    def attend(self, states: Tensor, seen: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Pass over `states` (batch, new, d), which are written behind what `cache` holds.

        Args:
            states: Vectors of one level of several branches, say.
            seen: Which slots of the cache each of them attends to, its own included, (batch or 1, new, slots).
            positions: (batch or 1, new).
            cache: Of earlier passes.
        """
        mask = states.new_zeros(()).where(seen, torch.finfo(states.dtype).min)[:, None]
        return self._pass(states, mask, positions, cache)

    def _pass(self, states: Tensor, mask: Any, positions: Tensor, cache: Cache) -> Tensor:
        if self.by_kind:
            mask = {"full_attention": mask, "sliding_attention": mask}
        output: Tensor = self.model(
            inputs_embeds=states, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).last_hidden_state
        return output

    def append(self, states: Tensor, lengths: list[int], cache: TreeCache) -> Tensor:
        """Causal pass over new `states` (batch, new, d), committing each row's first `lengths[b]` to the cache."""
        line = torch.arange(states.shape[1], device=states.device).expand(states.shape[:2])
        output = self.extend(states, TokenTree.chain(line), cache)
        cache.commit(line, lengths)
        return output
