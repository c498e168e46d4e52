"""One decoder layer of the target's own architecture over vectors that a drafter makes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModel, Cache

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.target import Target, tree_mask
from paperworks.decoding.tree import TokenTree


class DraftLayer(nn.Module):
    """A freshly initialised layer of the target's class, with its kind of positions, tree attention and a cache of its own.

    It sees all that came before, also where the target's own layers have windows.

    Args:
        target: Gives architecture and sizes; its weights are not copied.
        layers: How many layers.

    Raises:
        ValueError: an architecture of which no layer can be had alone.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
        ... )
        >>> layer = DraftLayer(Target(LlamaForCausalLM(config)))
        >>> layer(torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, target: Target, layers: int = 1) -> None:
        super().__init__()
        name = type(target.model).__name__
        if not target.takes_positions or target.ordered(1) or target.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"a draft layer reads trees at given places and states of the model's width, which layers of a {name} cannot: "
                "draft with Medusa, Hydra without a prefix layer, or a draft model (RecursiveSpeculation)"
            )
        config: Any = copy.deepcopy(target.config)
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * layers
        elif target.window is not None:
            config.sliding_window = None
        elif target.chunk is not None:
            config.attention_chunk_size = None
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = layers, 1, 0
        try:
            self.model: Any = AutoModel.from_config(config, attn_implementation=target.config._attn_implementation)
            decoder = getattr(self.model, "decoder", self.model)
            if layers not in {len(part) for part in decoder.children() if isinstance(part, nn.ModuleList)}:
                raise ValueError(f"its layers do not stand in one list of {layers}")
        except (AttributeError, IndexError, KeyError, StrictDataclassError, TypeError, ValueError) as error:
            raise ValueError(
                f"no {name} can be made of {layers} layers alone, as a draft layer is: draft with Medusa, Hydra without a "
                f"prefix layer, or a draft model (RecursiveSpeculation); {' '.join(str(error).split())}"
            ) from error
        # States come in and go out as they are: no embedding before, no norm behind.
        self.model.set_input_embeddings(nn.Identity())
        norms = [part for part, module in decoder.named_children() if "norm" in type(module).__name__.lower()]
        if len(norms) != 1:
            raise ValueError(
                f"a draft layer leaves out the one norm behind a {name}'s layers, but there are {len(norms)}: draft with "
                "Medusa, Hydra without a prefix layer, or a draft model (RecursiveSpeculation)"
            )
        setattr(decoder, norms[0], nn.Identity())
        self.context = target.context

    @property
    def layers(self) -> nn.ModuleList:
        """The layers themselves."""
        decoder = getattr(self.model, "decoder", self.model)
        return next(module for module in decoder.children() if isinstance(module, nn.ModuleList))

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
        if self.context is not None:
            # What lies past the context is never kept, but may need an embedding of its place.
            positions = positions.clamp(max=self.context - 1)
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
