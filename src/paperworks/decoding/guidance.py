"""Classifier-free guidance of autoregressive models (arXiv 2207.12598), in a form that drafting can use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from paperworks.decoding.target import Target


class _Guided(nn.Module):
    """The decoder of a guided model: its states are u + scale (c - u)."""

    condition: Tensor

    def __init__(self, decoder: nn.Module, layers: int, condition: Tensor, null: int, scale: float) -> None:
        super().__init__()
        self.decoder, self.layers, self.null, self.scale = decoder, layers, null, scale
        self.register_buffer("condition", condition, persistent=False)

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None, **options: Any) -> tuple[Tensor]:
        # Both streams read the same places in the same tree, so that one cache serves them: the first half of its
        # layers is the conditional stream's, and whatever is committed is committed in both.
        halves: tuple[Cache | None, Cache | None] = (None, None)
        if past_key_values is not None:
            layers = past_key_values.layers
            halves = Cache(layers=layers[: self.layers]), Cache(layers=layers[self.layers :])
        without = torch.where(torch.isin(input_ids, self.condition), self.null, input_ids)
        c, u = (
            self.decoder(input_ids=ids, past_key_values=cache, **options).last_hidden_state
            for ids, cache in zip((input_ids, without), halves, strict=True)
        )
        return (u + self.scale * (c - u),)


class ClassifierFreeGuidance(nn.Module):
    """A causal LM steered away from what it says without its condition: logits u + scale (c - u).

    The model runs twice, with its condition tokens and with `null` in their place. Since its head is linear, the
    combination is taken of the hidden states before it, and a drafter sees a model like any other: it reads, and is
    trained on, states whose logits are the guided ones. Temperature and top-k apply to the guided law, and so does
    acceptance.

    Args:
        model: A transformers causal LM, trained with its condition now and then replaced by `null`.
        condition: Ids of the tokens that carry the condition, such as class labels.
        null: Id that stands for no condition.
        scale: Strength; 1 leaves the conditional model as it is, LANTERN uses 3.

    Raises:
        TypeError, ValueError: a model that cannot be a `Target`, one that caps its logits, or a scale below 0.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> from paperworks.decoding import generate
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> guided = ClassifierFreeGuidance(LlamaForCausalLM(config).eval(), condition=[0, 1], null=2, scale=1.5)
        >>> len(generate(guided, torch.tensor([[1]]), max_new_tokens=5, eos_token_id=[]).new_tokens[0])
        5
    """

    def __init__(self, model: Any, *, condition: Sequence[int], null: int, scale: float = 3.0) -> None:
        super().__init__()
        target = Target(model)
        if getattr(target.config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its logits, so that guiding its states is not guiding its logits: use a "
                "model with a linear head"
            )
        if not target.takes_positions or target.ordered(1):
            raise ValueError(
                f"{type(model).__name__} tells places by where keys lie in its cache: guide a model that takes position ids, "
                "such as Llama or OPT"
            )
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale must be a number of at least 0, got {scale}")
        tokens = torch.tensor([*condition, null], device=target.device)
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < target.vocab_size:
            raise ValueError(f"condition and null must be token ids within 0..{target.vocab_size - 1}")
        self.model = model
        self.config: Any = copy.deepcopy(target.config)
        self.config.num_hidden_layers *= 2
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = 2 * self.config.layer_types
        self.generation_config = getattr(model, "generation_config", None)
        # As the model has it, for those who score its states.
        self.logit_scale = getattr(model, "logit_scale", None)
        self.base_model = _Guided(model.base_model, target.config.num_hidden_layers, tokens[:-1], null, scale)

    def get_input_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        """The model's head."""
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Guided logits; the arguments are the model's own.

        Args:
            input_ids: (batch, length).
            past_key_values: A cache with twice the model's layers, such as `TreeCache(self.config, batch)`.
            position_ids: Where the tokens stand.
            logits_to_keep: The last so many positions, all if 0, or the positions.
            **options: Mask and others, for both runs alike.
        """
        (states,) = self.base_model(input_ids, past_key_values=past_key_values, position_ids=position_ids, **options)
        kept = states[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else states[:, logits_to_keep]
        logits = Target(self.model).scorer().finish(self.get_output_embeddings()(kept))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
