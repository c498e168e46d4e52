"""The model whose text is wanted: prompts in, tree attention through a 4-D mask, hidden states out."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.tree import TokenTree

# What a layer may see of the tokens before it. Layers of other kinds sum them up, and cannot take one back.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
# Bytes and patches of them, streams for several tokens ahead, segments.
_OWN_CACHE = {"blt", "cpmant", "prophetnet"}
# Models whose window stands in their cache and not in their mask: within it they are like others.
_CACHE_WINDOW = {"moshi"}
_INSTEAD = "use a transformer such as Llama, Qwen3, Gemma3 or OPT, or the model's own generate"


@dataclass(frozen=True)
class Head:
    """What scores a state h: cap * tanh(scale * (W h + b) / cap), for all tokens or for some.

    Attributes:
        weight: W, (tokens, d).
        bias: b, (tokens,).
        scale: Factor of the scores.
        cap: What no score exceeds; None for no cap.

    Example:
        >>> Head(torch.eye(2), bias=torch.tensor([0.0, 1.0]), scale=0.5)(torch.tensor([4.0, 1.0])).tolist()
        [2.0, 1.0]
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Scores (..., tokens) of states (..., d), in the states' type."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return self.finish(nn.functional.linear(hidden, self.weight.to(hidden.dtype), bias))

    def finish(self, products: Tensor) -> Tensor:
        """Scores, given W h + b."""
        scores = products if self.scale == 1 else products * self.scale
        return scores if self.cap is None else torch.tanh(scores / self.cap) * self.cap


class Target:
    """A decoder-only transformers model seen through the three things that drafting needs.

    Works on unmodified models: the tree reaches the model as an additive 4-D attention mask plus position ids, and the
    hidden states are those that the base model hands to the language-model head. Windows and chunks limit what a node
    sees as they limit the model itself, whether they are given layer by layer or for all layers.

    A model that takes no position ids, or tells places by where keys lie in the cache (ALiBi, GPT-Neo's local layers),
    is `ordered`: it reads one prompt at a time, and of a tree only the path of first children.

    Args:
        model: A causal LM with `eager` or `sdpa` attention and keys and values in a cache (Llama, Qwen2, Qwen3,
            Gemma3, OPT and others alike).

    Attributes:
        context: Tokens that a text may have at most; None for no limit.
        turning_point: Tokens at which the model changes its rotary frequencies (LongRoPE); None where it never does.

    Raises:
        TypeError: not a decoder-only transformers causal LM.
        ValueError: its attention takes no 4-D mask, looks ahead, or keeps something else than keys and values.
    """

    def __init__(self, model: Any) -> None:
        config: Any = getattr(model, "config", None)
        head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if config is None or not isinstance(getattr(head, "weight", None), Tensor) or config.is_encoder_decoder:
            raise TypeError(
                f"expected a transformers causal language model with an output head, got {type(model).__name__}"
            )
        self.config = config.get_text_config()
        # PEFT's model stands around the one that decodes.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        base = inner.base_model
        if base is inner:
            # Some heads are named in a way that hides the model below them.
            base = next((part for part in inner.children() if isinstance(part, PreTrainedModel)), base)
        # Decoders cut out of encoder-decoders, and OPT, are called past the base model.
        decoder = getattr(base, "decoder", None) if isinstance(base, PreTrainedModel) else None
        self.model = model
        self.base: nn.Module = decoder if isinstance(decoder, nn.Module) else base
        self.head: Any = head
        self.embedding: Any = model.get_input_embeddings()
        arguments = _arguments(type(inner))  # type: ignore[arg-type]
        self._check(arguments | _arguments(type(self.base)))  # type: ignore[arg-type]
        kinds = getattr(self.config, "layer_types", None)
        self.window: int | None = self._limit("sliding_window", kinds, "sliding_attention")
        self.chunk: int | None = self._limit("attention_chunk_size", kinds, "chunked_attention")
        # Layers that differ take a mask for each kind, layers that are all alike one mask.
        self._by_kind = kinds is not None and (self.window or self.chunk) is not None
        self.takes_positions = "position_ids" in arguments
        self._free = self._free_places() if self.takes_positions else 0
        self._places: Tensor | None = None
        if self.config.model_type == "bloom" and model is inner and not {"forward"} & {*vars(inner), *vars(base)}:
            self.model, self._free = self._told_places(inner), None
        limits = (
            getattr(self.config, name, 0) for name in ("max_position_embeddings", "max_target_positions", "max_seq_len")
        )
        self.context: int | None = next((int(limit) for limit in limits if limit and limit > 0), None)
        if self.config.model_type in _CACHE_WINDOW and self.window is not None:
            self.context, self.window = min(self.context or self.window, self.window), None
        rope = getattr(self.config, "rope_parameters", None) or {}
        self.turning_point: int | None = min(
            (
                int(kind["original_max_position_embeddings"])
                for kind in (rope, *rope.values())
                if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
            ),
            default=None,
        )

    def _check(self, arguments: frozenset[str]) -> None:
        """Refuse what cannot be read on from keys and values, or cannot be told what to see."""
        name, config = type(self.model).__name__, self.config
        if (implementation := config._attn_implementation) not in ("eager", "sdpa"):
            raise ValueError(
                f"tree attention needs a 4-D mask, which {implementation!r} attention does not take: load {name} with "
                "attn_implementation='sdpa' or 'eager'"
            )
        if config.model_type in _OWN_CACHE:
            raise ValueError(f"{name} keeps more from pass to pass than keys and values of its tokens: {_INSTEAD}")
        if "past_key_values" not in arguments or not hasattr(config, "num_hidden_layers"):
            raise ValueError(f"{name} keeps no keys and values that another cache could hold: {_INSTEAD}")
        if others := set(getattr(config, "layer_types", None) or ()) - _KINDS:
            raise ValueError(
                f"{name} has layers of kind {', '.join(sorted(others))}, which keep something else than keys and values "
                f"of each token, so that no token can be taken back: {_INSTEAD}"
            )
        if getattr(self.model, "_is_stateful", False):
            raise ValueError(f"{name} keeps a running state, so that no token can be taken back: {_INSTEAD}")
        encoder = getattr(config, "is_decoder", None) is False and any(
            getattr(module, "is_decoder", None) is False for module in self.base.modules()
        )
        if encoder:
            raise ValueError(f"{name} is set up as an encoder, which looks ahead: load it with is_decoder=True")
        ahead = getattr(config, "use_bidirectional_attention", None) in (True, "all")
        if ahead or not getattr(config, "is_causal", True):
            raise ValueError(f"the attention of this {name} looks ahead, so that it cannot write: {_INSTEAD}")
        if getattr(self.base, "attention_type", None) == "block_sparse":
            raise ValueError(
                f"{name} chooses by chance what it sees of long texts: load it with attention_type='original_full'"
            )

    def _limit(self, name: str, kinds: list[str] | None, kind: str) -> int | None:
        """How many tokens the layers of a kind see; without kinds all layers are alike."""
        config = self.config
        if kinds is not None and kind not in kinds:
            return None
        if not getattr(config, "is_heterogeneous", False):
            return getattr(config, name, None)
        layers = zip(config.per_layer_config, kinds or [kind] * config.num_hidden_layers, strict=True)
        limits = {getattr(layer, name, None) for layer, other in layers if other == kind}
        if len(limits) > 1:
            raise ValueError(
                f"the layers of this {type(self.model).__name__} have different values of {name}, {limits}, and one mask "
                f"cannot tell them apart: give all layers one value, or {_INSTEAD}"
            )
        return limits.pop()

    def _free_places(self) -> int | None:
        """Places in the cache within which it does not matter where a key lies; None for all."""
        config = self.config
        if getattr(config, "alibi", False):
            return 0
        if "local" in (getattr(config, "attention_layers", None) or ()):
            return int(config.window_size)
        if getattr(config, "attn_temperature_tuning", False):
            return int(config.floor_scale) - 1
        return None

    def _told_places(self, model: Any) -> Any:
        """A BLOOM whose ALiBi follows from where keys stand in their texts, not from where they lie in the cache.

        The model is shared, and stays as it is: it and its base model are shallow copies, with all their parts in common.
        """
        base = copy.copy(model.base_model)
        slopes = model.base_model.build_alibi_tensor(
            torch.ones(1, 2, dtype=torch.long, device=self.device), base.num_heads, torch.float32
        )[:, 0, 1]

        def alibi(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
            assert self._places is not None
            return (slopes[:, None] * self._places[:, None]).view(-1, 1, mask.shape[-1]).to(dtype)

        base.build_alibi_tensor = alibi
        double = copy.copy(model)
        double._modules = {name: base if part is model.base_model else part for name, part in model._modules.items()}
        return double

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
        """Width d of the states that the base model puts out."""
        # Small OPT models bring them to another width behind their layers.
        projected = getattr(self.base, "project_out", None) is not None
        return int(self.head.weight.shape[1] if projected else self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Tokens that the head scores."""
        return int(self.head.weight.shape[0])

    def ordered(self, places: int) -> bool:
        """Whether texts that fill so many places of the cache can only be read one by one and without branches."""
        return self._free is not None and places > self._free

    def check_texts(self, lengths: list[int], new: int) -> None:
        """Raise ValueError if texts of such lengths that get so many new tokens cannot be read in one batch."""
        name, longest = type(self.model).__name__, max(lengths) + new
        if len(lengths) > 1 and self.ordered(longest):
            raise ValueError(
                f"{name} tells places by where keys lie in its cache, which differs in the rows of a batch: give the "
                "prompts one by one"
            )
        if self.turning_point is not None and min(lengths) <= self.turning_point < longest:
            raise ValueError(
                f"{name} changes its rotary frequencies at {self.turning_point} tokens and would have to read anew what it "
                f"has read: keep prompt and new tokens below, or give prompts beyond (got {min(lengths)} and {new})"
            )

    def readable(self, tree: TokenTree, cache: TreeCache) -> TokenTree:
        """What of `tree` the model can read in one pass: all of it, or where it is `ordered` the path of first children.

        Acceptance stays as exact as it was: it takes siblings in order, and may do without the later ones.
        """
        if self._free is None or not self.ordered(max(cache.lengths) + tree.tokens.shape[1]) or tree.is_chain:
            return tree
        return tree.first_path()

    def prefill(self, prompts: list[Tensor], cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Read prompts of any lengths into an empty cache.

        Args:
            prompts: One 1-D tensor of token ids a row.
            cache: An empty cache of as many rows.

        Returns:
            Logits behind each prompt (batch, vocab), and hidden states (batch, longest, d), of which each row's first
            `len(prompt)` count.

        Raises:
            ValueError: prompts that the model cannot read in one batch, see `check_texts`.
        """
        lengths = [len(prompt) for prompt in prompts]
        self.check_texts(lengths, 0)
        tokens = nn.utils.rnn.pad_sequence([prompt.to(self.device) for prompt in prompts], batch_first=True)
        last = torch.tensor([length - 1 for length in lengths], device=self.device)
        columns, which = last.unique(return_inverse=True)
        path = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        mask = None if len(set(lengths)) == 1 else self._mask(TokenTree.chain(tokens), cache.lengths)
        logits, hidden = self._forward(tokens, cache, path, mask, keep=columns)
        if logits.shape[1] != len(columns):
            # Some models know no `logits_to_keep` and score all positions.
            which = last
        cache.commit(path, lengths)
        return logits[torch.arange(len(prompts), device=self.device), which], hidden

    def verify(self, tree: TokenTree, cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Logits (batch, nodes, vocab) and hidden states (batch, nodes, d) of every node of `tree`.

        The nodes' keys and values are in the cache behind the committed tokens until `cache.commit` keeps some.

        Raises:
            ValueError: branches, for a model that is `ordered`; see `readable`.
        """
        nodes = tree.tokens.shape[1]
        if nodes == 1:
            return self.read_on(tree.tokens, cache)
        if self._free is not None and self.ordered(max(cache.lengths) + nodes):
            if not tree.is_chain:
                raise ValueError(
                    f"{type(self.model).__name__} tells places by where keys lie in its cache, and cannot read branches: "
                    f"decode without them, such as by `generate` with any drafter, or {_INSTEAD}"
                )
            return self.read_on(tree.tokens, cache)
        lengths = torch.tensor(cache.lengths, device=self.device)
        return self._forward(
            tree.tokens, cache, lengths[:, None] + tree.depths, self._mask(tree, cache.lengths), keep=0
        )

    def read_on(self, tokens: Tensor, cache: TreeCache, *, keep: int = 0) -> tuple[Tensor, Tensor]:
        """Read what follows in each row, as `verify` reads a tree without branches.

        Args:
            tokens: Token ids (batch, new), or vectors (batch, new, d) in the place of their embeddings.
            cache: What was read before.
            keep: Of how many of the last tokens the logits are wanted; all if 0.

        Raises:
            ValueError: rows of different lengths, for a model that is `ordered`.
        """
        if tokens.is_floating_point() and getattr(self.config, "hidden_size_per_layer_input", None):
            raise ValueError(
                f"{type(self.model).__name__} looks tokens up in each layer too, so that no vector can stand for one: take a "
                "model that embeds tokens once, such as Llama or Qwen3"
            )
        new = tokens.shape[1]
        line = torch.arange(new, device=self.device)
        if min(cache.lengths) == (longest := max(cache.lengths)):
            # The model knows by itself what comes next in rows of one length.
            return self._forward(tokens, cache, (longest + line).expand(len(tokens), -1), None, keep)
        if self._free is not None and self.ordered(longest + new):
            raise ValueError(
                f"{type(self.model).__name__} tells places by where keys lie in its cache, which differs in these rows of "
                f"{cache.lengths} tokens: read texts of one length together, or one by one"
            )
        chain = TokenTree.chain(line.expand(len(tokens), -1))
        lengths = torch.tensor(cache.lengths, device=self.device)
        return self._forward(tokens, cache, lengths[:, None] + line, self._mask(chain, cache.lengths), keep)

    def head_rows(self, vocabulary: Tensor | None = None) -> Tensor:
        """The head's weight, (vocab, d), or only its rows for the tokens of `vocabulary`; without gradient."""
        weight: Tensor = self.head.weight.detach()
        return weight if vocabulary is None else weight[vocabulary]

    def scorer(self, vocabulary: Tensor | None = None) -> Head:
        """The head, with all that the model does to its scores; or only for the tokens of `vocabulary`, in their order."""
        bias: Tensor | None = getattr(self.head, "bias", None)
        if bias is not None:
            bias = bias.detach() if vocabulary is None else bias.detach()[vocabulary]
        # Cohere multiplies by what its model holds; Granite and MiniCPM divide by what their configuration calls alike
        # in HyperCLOVA X, which multiplies.
        scale = float(getattr(self.model, "logit_scale", None) or 1.0)
        if scaling := getattr(self.config, "logits_scaling", None):
            scale *= scaling if self.config.model_type == "hyperclovax" else 1 / scaling
        return Head(self.head_rows(vocabulary), bias, scale, getattr(self.config, "final_logit_softcapping", None))

    def logits(self, hidden: Tensor, vocabulary: Tensor | None = None) -> Tensor:
        """Scores of states (..., d) by the head, as the model scores them; of all tokens or of those of `vocabulary`."""
        return self.scorer(vocabulary)(hidden)

    def check_scorer(self, hidden: Tensor, logits: Tensor) -> None:
        """Raise ValueError if the model's `logits` (..., vocab) of its states (..., d) are not those of `scorer`.

        Some models, such as BERT, put more than a linear head between the two.
        """
        alike = hidden.shape[-1] == self.head.weight.shape[1]
        if alike:
            difference = (self.logits(hidden).float() - logits.float()).abs().amax()
            close = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.05
            # A NaN is for others to complain of.
            alike = not bool(difference > close * logits.abs().amax().clamp(min=1))
        if not alike:
            raise ValueError(
                f"{type(self.model).__name__} does more to its states than a linear head with a scale and a cap, so that "
                "states alone cannot be scored: draft with a model of its own (RecursiveSpeculation, without a vocabulary), "
                "or take a transformer with a linear head such as Llama, GPT-2 or OPT"
            )

    def check_states(self) -> None:
        """Raise ValueError unless a drafter can read, embed for and score this model's states; one token is read for it."""
        with torch.no_grad():
            logits, hidden = self.prefill([torch.zeros(1, dtype=torch.long)], TreeCache(self.config, 1))
        self.check_scorer(hidden[0, -1], logits[0])
        if (width := self.embedding.weight.shape[-1]) != self.hidden_size:
            raise ValueError(
                f"{type(self.model).__name__} has embeddings of {width} numbers and states of {self.hidden_size}, and this "
                "drafter reads both alike: draft with a model of its own (RecursiveSpeculation)"
            )

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (..., d) of token ids, without gradient: the target is frozen."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def inputs(self, tokens: Tensor, positions: Tensor) -> dict[str, Tensor]:
        """Token ids, or vectors in their place, and where they stand, as arguments of the model."""
        given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        if self.takes_positions:
            # Nodes past the context are beyond max_new_tokens too and never kept, but an embedding must exist.
            given["position_ids"] = positions if self.context is None else positions.clamp(max=self.context - 1)
        return given

    def _forward(
        self, tokens: Tensor, cache: TreeCache, positions: Tensor, mask: Any, keep: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        with _states_of(self.base) as seen:
            output = self.model(
                **self.inputs(tokens, positions),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        if not getattr(cache.layers[0], "is_initialized", False) or not seen:
            raise ValueError(f"{type(self.model).__name__} did not use the key-value cache it was given: {_INSTEAD}")
        return output.logits, seen[-1]

    def _mask(self, tree: TokenTree, lengths: list[int], first: int = 0) -> Any:
        """The additive mask of a tree's nodes from `first` on; one for each kind of layers where they differ."""

        def mask(window: int | None = None, chunk: int | None = None) -> Tensor:
            return tree_mask(tree, lengths, self.dtype, window, chunk, first=first)

        if not self.takes_positions:
            self._places = slot_positions(tree, lengths)
        # Where all fits into the window or the first chunk, neither limits anything.
        places = max(lengths) + tree.tokens.shape[1]
        window = self.window if self.window is not None and places > self.window else None
        chunk = self.chunk if self.chunk is not None and places > self.chunk else None
        if not self._by_kind:
            return mask(window, chunk)
        masks = {"full_attention": mask()}
        masks["sliding_attention"] = masks["full_attention"] if window is None else mask(window)
        masks["chunked_attention"] = masks["full_attention"] if chunk is None else mask(chunk=chunk)
        return masks


@cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    """Names of what a class of models can be given."""
    return frozenset(inspect.signature(kind.forward).parameters)


# torch counts hooks without a lock: two threads may be given one number, and one of their hooks be lost.
_HOOKING = threading.Lock()


@contextmanager
def _states_of(base: nn.Module) -> Iterator[list[Tensor]]:
    """What `base` puts out meanwhile in this thread: the head's input, also where logits are asked for few positions.

    The model is shared. The hook is there for one pass, and passes that other threads make meanwhile are theirs.
    """
    seen: list[Tensor] = []
    reader = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == reader:
            seen.append(output[0])

    with _HOOKING:
        handle = base.register_forward_hook(keep)
    with handle:
        yield seen


def tree_mask(
    tree: TokenTree,
    lengths: list[int],
    dtype: torch.dtype,
    window: int | None = None,
    chunk: int | None = None,
    *,
    first: int = 0,
) -> Tensor:
    """Additive attention mask of a tree behind committed tokens, shape (batch, 1, nodes - first, longest + nodes).

    A node sees the committed tokens of its row, its ancestors and itself, and nothing else; with `window`, only those
    of them that are fewer than `window` positions behind it, with `chunk` only those in the same stretch of so many
    positions. Rows are those of the nodes from `first` on.
    """
    nodes = tree.tokens.shape[1]
    device, longest = tree.tokens.device, max(lengths)
    behind = torch.tensor(lengths, device=device)[:, None]
    slots = torch.arange(longest + nodes, device=device)
    seen = (slots < behind)[:, None].repeat(1, nodes - first, 1)
    own = behind + torch.arange(nodes, device=device)
    seen.scatter_(2, own[:, None].expand(-1, nodes - first, -1), tree.ancestors[:, first:])
    if window is not None or chunk is not None:
        slot_position = slot_positions(tree, lengths)[:, None]
        position = (behind + tree.depths)[:, first:, None]
        if window is not None:
            seen &= position - slot_position < window
        if chunk is not None:
            seen &= position // chunk == slot_position // chunk
    zero = torch.zeros((), dtype=dtype, device=device)
    return torch.where(seen, zero, torch.finfo(dtype).min)[:, None]


def slot_positions(tree: TokenTree, lengths: list[int]) -> Tensor:
    """Place in its text of what lies in each slot of the cache, (batch, longest + nodes), a tree's nodes included."""
    batch, nodes = tree.tokens.shape
    behind = torch.tensor(lengths, device=tree.tokens.device)[:, None]
    slots = torch.arange(max(lengths) + nodes, device=tree.tokens.device)
    return slots.expand(batch, -1).scatter(1, behind + slots[:nodes], behind + tree.depths)
