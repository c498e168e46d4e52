"""The model whose text is wanted: prompts in, tree attention through a 4-D mask, hidden states out."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.tree import TokenTree

_WINDOWED = {"sliding_attention"}


class Target:
    """A decoder-only transformers model seen through the three things that drafting needs.

    Works on unmodified models: the tree reaches the model as an additive 4-D attention mask plus position ids, and the
    hidden states are those that the base model hands to the language-model head.

    Args:
        model: A causal LM with `eager` or `sdpa` attention and keys and values in a cache (Llama, Qwen2, Qwen3,
            Gemma3 and others alike).

    Raises:
        TypeError: not a decoder-only transformers causal LM.
        ValueError: its attention takes no 4-D mask or keeps no key-value cache.
    """

    def __init__(self, model: Any) -> None:
        config: Any = getattr(model, "config", None)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if config is None or head is None or config.is_encoder_decoder:
            raise TypeError(
                f"expected a transformers causal language model with an output head, got {type(model).__name__}"
            )
        self.config = config.get_text_config()
        implementation = self.config._attn_implementation
        kinds = set(getattr(self.config, "layer_types", None) or {"full_attention"})
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"tree attention needs a 4-D mask, which {implementation!r} attention does not take: load "
                f"{type(model).__name__} with attn_implementation='sdpa' or 'eager'"
            )
        if kinds - {"full_attention"} - _WINDOWED or not hasattr(self.config, "num_attention_heads"):
            raise ValueError(
                f"{type(model).__name__} has no usable attention interface: every layer must keep keys and values in a "
                f"cache, but its layers are {sorted(kinds)}; use a transformer such as Llama, Qwen or Gemma"
            )
        self.model = model
        self.base: nn.Module = model.base_model
        self.head: Any = head
        self.embedding: Any = model.get_input_embeddings()
        self.windowed = bool(kinds & _WINDOWED)
        self.window: int | None = getattr(self.config, "sliding_window", None) if self.windowed else None
        self.context = int(getattr(self.config, "max_position_embeddings", 0)) or None
        # The base model's output is the head's input; a hook sees it even when logits are asked for few positions.
        # It must not know this object, or the model would keep it, and the hook, alive for ever.
        self._seen: list[Tensor] = []
        seen = self._seen
        handle = self.base.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        weakref.finalize(self, handle.remove)

    @property
    def device(self) -> torch.device:
        """Where the model's embedding lies."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self.embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width d of the states that the head reads."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Tokens that the head scores."""
        return int(self.head.weight.shape[0])

    def prefill(self, prompts: list[Tensor], cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Read prompts of any lengths into an empty cache.

        Args:
            prompts: One 1-D tensor of token ids a row.
            cache: An empty cache of as many rows.

        Returns:
            Logits behind each prompt (batch, vocab), and hidden states (batch, longest, d), of which each row's first
            `len(prompt)` count.
        """
        lengths = [len(prompt) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence([prompt.to(self.device) for prompt in prompts], batch_first=True)
        last = torch.tensor([length - 1 for length in lengths], device=self.device)
        columns, which = last.unique(return_inverse=True)
        alone = len(set(lengths)) == 1
        tree = TokenTree.chain(tokens)
        logits, hidden = self._forward(
            tokens,
            cache,
            positions=torch.arange(tokens.shape[1], device=self.device).expand_as(tokens),
            mask=None if alone and not self.windowed else self._mask(tree, cache.lengths),
            keep=columns,
        )
        path = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        cache.commit(path, lengths)
        return logits[torch.arange(len(prompts), device=self.device), which], hidden

    def verify(self, tree: TokenTree, cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Logits (batch, nodes, vocab) and hidden states (batch, nodes, d) of every node of `tree`.

        The nodes' keys and values are in the cache behind the committed tokens until `cache.commit` keeps some.
        """
        lengths = torch.tensor(cache.lengths, device=self.device)
        positions = lengths[:, None] + tree.depths
        if self.context is not None:
            # Nodes past the context are beyond max_new_tokens too and never kept, but an embedding must exist.
            positions = positions.clamp(max=self.context - 1)
        plain = tree.tokens.shape[1] == 1 and len(set(cache.lengths)) == 1 and not self.windowed
        return self._forward(tree.tokens, cache, positions, None if plain else self._mask(tree, cache.lengths), 0)

    def head_rows(self, vocabulary: Tensor | None = None) -> Tensor:
        """The head's weight, (vocab, d), or only its rows for the tokens of `vocabulary`; without gradient."""
        weight: Tensor = self.head.weight.detach()
        return weight if vocabulary is None else weight[vocabulary]

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., d) of token ids, without gradient: the target is frozen."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores of states (..., d) by the head, or by some `head_rows` of it, capped as the model caps them."""
        rows = self.head_rows() if rows is None else rows
        bias = getattr(self.head, "bias", None)
        logits = nn.functional.linear(hidden, rows, bias if len(rows) == self.vocab_size else None)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _forward(
        self, tokens: Tensor, cache: TreeCache, positions: Tensor, mask: Any, keep: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        output = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        if not getattr(cache.layers[0], "is_initialized", False) or not self._seen:
            raise ValueError(
                f"{type(self.model).__name__} did not use the key-value cache it was given: no tree decoding"
            )
        return output.logits, self._seen.pop()

    def _mask(self, tree: TokenTree, lengths: list[int], first: int = 0) -> Any:
        full = tree_mask(tree, lengths, self.dtype, first=first)
        if not self.windowed:
            return full
        windowed = tree_mask(tree, lengths, self.dtype, self.window, first=first)
        return {"full_attention": full, "sliding_attention": windowed}


def tree_mask(
    tree: TokenTree, lengths: list[int], dtype: torch.dtype, window: int | None = None, *, first: int = 0
) -> Tensor:
    """Additive attention mask of a tree behind committed tokens, shape (batch, 1, nodes - first, longest + nodes).

    A node sees the committed tokens of its row, its ancestors and itself, and nothing else; with `window`, only those
    of them that are fewer than `window` positions behind it. Rows are those of the nodes from `first` on.
    """
    batch, nodes = tree.tokens.shape
    device, longest = tree.tokens.device, max(lengths)
    behind = torch.tensor(lengths, device=device)[:, None]
    slots = torch.arange(longest + nodes, device=device)
    seen = (slots < behind)[:, None].repeat(1, nodes - first, 1)
    own = behind + torch.arange(nodes, device=device)
    seen.scatter_(2, own[:, None].expand(-1, nodes - first, -1), tree.ancestors[:, first:])
    if window is not None:
        position = behind + tree.depths
        slot_position = slots.expand(batch, -1).scatter(1, own, position)
        seen &= position[:, first:, None] - slot_position[:, None] < window
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]
