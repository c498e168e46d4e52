"""`generate`: draft a tree, verify it in one pass of the target, keep what is accepted; again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from paperworks.decoding.acceptance import Acceptance, Accepted, Exact, Greedy
from paperworks.decoding.cache import TreeCache
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree


@dataclass
class Statistics:
    """What a generation cost.

    Attributes:
        target_calls: Passes of the target after the prompt's.
        drafted: Tokens drafted, over all rows.
        emitted: For each row, the tokens that each of its target calls gave.
        drafting_seconds: Time in the drafter. On a GPU kernels run on behind the clock; see `generate(profile=True)`.
        target_seconds: Time in the target, the prompt's pass included.
    """

    target_calls: int = 0
    drafted: int = 0
    emitted: list[list[int]] = field(default_factory=list)
    drafting_seconds: float = 0.0
    target_seconds: float = 0.0

    @property
    def accepted_per_call(self) -> float:
        """Mean tokens a row gains by a target call, the target's own included; plain decoding has 1."""
        calls = sum(len(row) for row in self.emitted)
        return sum(map(sum, self.emitted)) / calls if calls else float("nan")


@dataclass
class Generation:
    """The result of `generate`.

    Attributes:
        sequences: Prompt (as given, padding included) and new tokens, shape (batch, length), padded on the right.
        new_tokens: The new tokens of each row, end-of-sequence token included where one came.
        statistics: What it cost.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    statistics: Statistics


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int = 0,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    profile: bool = False,
) -> Generation:
    """Continue prompts with `model`, drafting with `drafter`; plain decoding without one.

    With the default acceptance the output follows the model's own law: its greedy text at temperature 0, exact samples
    above.

    Args:
        model: A transformers causal LM.
        input_ids: Prompts, shape (batch, length) or (length,).
        attention_mask: 0 where a prompt is padding, on either side; shape of `input_ids`.
        drafter: Proposes token trees.
        acceptance: Decides what to keep; `Greedy()` at temperature 0 and `Exact()` above by default.
        max_new_tokens: Tokens to add at most.
        temperature: 0 for greedy decoding.
        top_k: Sample among the k most likely tokens.
        top_p: Sample among the most likely tokens that make up this probability.
        eos_token_id: Token or tokens that end a row; the model's generation config has the say if None, [] for none.
        pad_token_id: Fills rows that ended early.
        streamer: A transformers streamer (`put`, `end`); one prompt only.
        generator: Source of randomness.
        profile: Wait for the GPU at each part so that its share of the time is right.

    Returns:
        A `Generation`.

    Raises:
        TypeError: not a causal language model.
        ValueError: empty prompt, max_new_tokens below 1, a prompt longer than the context, NaN logits, a model without
            a usable attention interface, or a sampling value out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> result = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5, eos_token_id=[])
        >>> result.sequences.shape, result.statistics.target_calls
        (torch.Size([1, 8]), 4)
    """
    input_ids = input_ids[None] if input_ids.ndim == 1 else input_ids
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer prints one prompt, got {len(input_ids)}: generate them one by one")
    statistics = Statistics()
    rows: list[list[int]] = [[] for _ in range(len(input_ids))]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for new in stream(
        model,
        input_ids,
        attention_mask=attention_mask,
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        eos_token_id=eos_token_id,
        generator=generator,
        profile=profile,
        statistics=statistics,
    ):
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
        if streamer is not None and new[0]:
            streamer.put(torch.tensor(new[0]))
    if streamer is not None:
        streamer.end()
    longest = max(map(len, rows))
    padded = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows], device=input_ids.device)
    return Generation(torch.cat([input_ids, padded], dim=1), rows, statistics)


@torch.inference_mode()
def stream(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    eos_token_id: int | list[int] | None = None,
    generator: torch.Generator | None = None,
    profile: bool = False,
    statistics: Statistics | None = None,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new tokens of each row; the arguments are those of `generate`."""
    sampling = sampling or Sampling()
    statistics = statistics if statistics is not None else Statistics()
    target = Target(model)
    prompts = split_prompts(input_ids, attention_mask)
    check_lengths(target, prompts, max_new_tokens)
    ends = end_tokens(model, eos_token_id)
    accept = acceptance or (Greedy() if sampling.greedy else Exact())
    clock = _Clock(target.device if profile else None)
    batch = len(prompts)
    statistics.emitted = [[] for _ in prompts]

    cache = TreeCache(target.config, batch)
    logits, hidden = target.prefill(prompts, cache)
    # The first token is the law behind a tree of nothing but its root.
    nothing = TokenTree.chain(torch.zeros(batch, 1, dtype=torch.long, device=target.device))
    root = accept(nothing, logits[:, None], sampling, generator).next_tokens
    committed = Committed(nn.utils.rnn.pad_sequence(prompts, batch_first=True), hidden, cache.lengths[:])
    state = drafter.start(target, batch, sampling) if drafter is not None else None
    statistics.target_seconds += clock.lap()

    remaining = [max_new_tokens] * batch
    new = _cut([[token] for token in root.tolist()], remaining, ends)
    yield new
    while any(remaining):
        clock.lap()
        tree = (
            drafter.propose(state, committed, root, generator)
            if drafter is not None
            else TokenTree.chain(root[:, None])
        )
        # A last token needs no draft behind it.
        tree = tree.up_to(max(remaining) - 1)
        statistics.drafting_seconds += clock.lap()
        logits, hidden = target.verify(tree, cache)
        statistics.target_seconds += clock.lap()
        statistics.target_calls += 1
        statistics.drafted += tree.tokens.numel() - batch

        accepted = accept(tree, logits, sampling, generator)
        alive = [count > 0 for count in remaining]
        counts = [length * live for length, live in zip(accepted.lengths.tolist(), alive, strict=True)]
        cache.commit(accepted.path, counts)
        committed = _committed(tree, hidden, accepted, counts)
        kept = committed.tokens[:, 1:].tolist()
        following = accepted.next_tokens.tolist()
        new = [[*kept[b][: counts[b] - 1], following[b]] if alive[b] else [] for b in range(batch)]
        new = _cut(new, remaining, ends)
        for emitted, tokens in zip(statistics.emitted, new, strict=True):
            if tokens:
                emitted.append(len(tokens))
        root = accepted.next_tokens
        yield new


def as_custom_generate(
    drafter: Drafter | None = None, acceptance: Acceptance | None = None, generator: torch.Generator | None = None
) -> Callable[..., Tensor]:
    """This engine as transformers' decoding loop.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model.generate(ids, custom_generate=as_custom_generate(), max_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    def decode(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
        config = kwargs["generation_config"]
        if config.num_beams != 1 or config.num_return_sequences != 1:
            raise ValueError("tree decoding returns one sequence a prompt and uses no beams: leave num_beams at 1")
        if config.max_length is None or (new := config.max_length - input_ids.shape[1]) < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got max_length={config.max_length} with this prompt")
        return generate(
            model,
            input_ids,
            attention_mask=kwargs.get("attention_mask"),
            drafter=drafter,
            acceptance=acceptance,
            max_new_tokens=new,
            temperature=(1.0 if config.temperature is None else config.temperature) if config.do_sample else 0.0,
            top_k=(config.top_k or None) if config.do_sample else None,
            top_p=config.top_p if config.do_sample else None,
            eos_token_id=config.eos_token_id if config.eos_token_id is not None else [],
            pad_token_id=int(config.pad_token_id or 0),
            streamer=kwargs.get("streamer"),
            generator=generator,
        ).sequences

    return decode


def split_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The prompts of a padded batch, each without its padding.

    Raises:
        ValueError: not integers of shape (batch, length), or a mask of another shape.
    """
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not len(input_ids):
        raise ValueError(
            f"input_ids must be integers of shape (batch, length), got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if attention_mask is None:
        return list(input_ids)
    return [row[keep.bool()] for row, keep in zip(input_ids, attention_mask, strict=True)]


def check_lengths(target: Target, prompts: list[Tensor], max_new_tokens: int) -> None:
    """Raise ValueError for an empty prompt, unknown token ids, or more tokens than the model's context holds."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give at least one token, such as the beginning-of-sequence token")
        if int(prompt.max()) >= target.vocab_size or int(prompt.min()) < 0:
            raise ValueError(f"prompt {row} holds token ids outside 0..{target.vocab_size - 1}: wrong tokenizer?")
        if target.context is not None and len(prompt) + max_new_tokens > target.context:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens and {max_new_tokens} more are asked for, but the model's context "
                f"holds {target.context}: shorten the prompt or lower max_new_tokens"
            )


def end_tokens(model: nn.Module, eos_token_id: int | list[int] | None) -> set[int]:
    """The tokens that end a text: those given, else those of the model's generation config."""
    if eos_token_id is None:
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.tolist()
    if eos_token_id is None:
        return set()
    return {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)


def _cut(new: list[list[int]], remaining: list[int], ends: set[int]) -> list[list[int]]:
    """Cut each row at its limit and behind an end token; `remaining` is counted down in place."""
    for row, tokens in enumerate(new):
        tokens = tokens[: remaining[row]]
        stop = next((index for index, token in enumerate(tokens) if token in ends), None)
        new[row] = tokens if stop is None else tokens[: stop + 1]
        remaining[row] = 0 if stop is not None else remaining[row] - len(tokens)
    return new


def _committed(tree: TokenTree, hidden: Tensor, accepted: Accepted, counts: list[int]) -> Committed:
    path = accepted.path.clamp(min=0)
    rows = torch.arange(len(counts), device=path.device)[:, None]
    return Committed(tree.tokens[rows, path], hidden[rows, path], counts)


class _Clock:
    """Seconds between laps; waits for `device` first where one is given."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device
        self.last = perf_counter()

    def lap(self) -> float:
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = perf_counter()
        self.last, seconds = now, now - self.last
        return seconds
