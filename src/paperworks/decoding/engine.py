"""`generate`: draft a tree, verify it in one pass of the target, keep what is accepted; again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerateDecoderOnlyOutput

from paperworks.decoding.acceptance import Acceptance, Accepted, Exact, Greedy
from paperworks.decoding.cache import TreeCache
from paperworks.decoding.drafter import Committed, Drafter
from paperworks.decoding.options import (
    Record,
    StopCheck,
    TreeProcessors,
    as_criteria,
    as_processors,
    asked_of_generate,
    withheld_arguments,
)
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
    logits_processor: Any = None,
    stopping_criteria: Any = None,
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
        logits_processor: One of transformers' logits processors or a list of them: any function of token ids (batch,
            length), padded on the left, and logits (batch, vocab). It changes the law, before temperature and the like,
            and is asked about texts that are only drafted: it must remember nothing from call to call.
        stopping_criteria: One of transformers' stopping criteria or a list of them. Rows that it does not stop go on.
        eos_token_id: Token or tokens that end a row; the model's generation config has the say if None, [] for none.
        pad_token_id: Fills rows that ended early.
        streamer: A transformers streamer (`put`, `end`); one prompt only.
        generator: Source of randomness.
        profile: Wait for the GPU at each part so that its share of the time is right.

    Returns:
        A `Generation`.

    Raises:
        TypeError: not a causal language model, prompts that are no tensor, a drafter that is none, or a processor or
            criterion that is no function.
        ValueError: a drafter that was made for another model, an empty prompt, max_new_tokens below 1, a prompt longer than
            the context, logits that are NaN or infinite, a model without a usable attention interface, a sampling value out
            of range, or a processor that remembers earlier calls.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> result = generate(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5, eos_token_id=[])
        >>> result.sequences.shape, result.statistics.target_calls
        (torch.Size([1, 8]), 4)
    """
    input_ids = as_prompts(input_ids)
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer prints one prompt, got {len(input_ids)}: generate them one by one")
    statistics = Statistics()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    steps = stream(
        model,
        input_ids,
        attention_mask=attention_mask,
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        generator=generator,
        profile=profile,
        statistics=statistics,
    )
    return _gather(steps, input_ids, statistics, pad_token_id, streamer)


def _gather(
    steps: Iterator[list[list[int]]], input_ids: Tensor, statistics: Statistics, pad: int, streamer: Any
) -> Generation:
    rows: list[list[int]] = [[] for _ in range(len(input_ids))]
    for new in steps:
        for row, tokens in zip(rows, new, strict=True):
            row.extend(tokens)
        if streamer is not None and new[0]:
            streamer.put(torch.tensor(new[0]))
    if streamer is not None:
        streamer.end()
    longest = max(map(len, rows))
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=input_ids.device)
    return Generation(torch.cat([input_ids, padded], dim=1), rows, statistics)


def stream(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    drafter: Drafter | None = None,
    acceptance: Acceptance | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    profile: bool = False,
    statistics: Statistics | None = None,
) -> Iterator[list[list[int]]]:
    """Yield, step by step, the new tokens of each row; the arguments are those of `generate`.

    With stopping criteria a row that is ahead of the others keeps back what may still be cut.
    """
    return _steps(
        model,
        as_prompts(input_ids),
        attention_mask=attention_mask,
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        ends=end_tokens(model, eos_token_id),
        pad=pad_token_id,
        generator=generator,
        profile=profile,
        statistics=statistics if statistics is not None else Statistics(),
    )


@torch.inference_mode()
def _steps(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None,
    drafter: Drafter | None,
    acceptance: Acceptance | None,
    max_new_tokens: int,
    sampling: Sampling,
    logits_processor: Any,
    stopping_criteria: Any,
    ends: set[int],
    pad: int,
    generator: torch.Generator | None,
    statistics: Statistics,
    profile: bool = False,
    drafting: Sampling | None = None,
    record: Record | None = None,
) -> Iterator[list[list[int]]]:
    """The loop. The drafter is told of `drafting` where `logits_processor` does what `sampling` would have done."""
    target = Target(model)
    prompts = split_prompts(input_ids, attention_mask)
    check_lengths(target, prompts, max_new_tokens)
    if drafter is not None:
        if not isinstance(drafter, Drafter):
            raise TypeError(f"drafter must be one such as Hydra.from_target(model), got {type(drafter).__name__}")
        drafter.check_model(model)
        drafter.check_texts([len(prompt) for prompt in prompts], max_new_tokens)
    accept = acceptance or (Greedy() if sampling.greedy else Exact())
    clock = _Clock(target.device if profile else None)
    batch = len(prompts)
    rows = torch.arange(batch, device=target.device)[:, None]
    statistics.emitted = [[] for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    remaining, given = [max_new_tokens] * batch, [0] * batch
    processors, criteria = as_processors(logits_processor), as_criteria(stopping_criteria)
    process, stop_check = None, None
    if processors or criteria:
        padded = _left_padded(input_ids.long(), attention_mask).to(target.device)
        process = TreeProcessors(processors, padded, pad) if processors else None
        stop_check = StopCheck(criteria, padded, pad, fill=bool(ends)) if criteria else None

    def choose(tree: TokenTree, logits: Tensor) -> tuple[Accepted, list[int]]:
        """Decide on a tree and write down the new tokens; also how many of its nodes each row keeps."""
        scores = logits if process is None else process(tree, logits, texts, remaining)
        accepted = accept(tree, scores, sampling, generator)
        counts = [length * (left > 0) for length, left in zip(accepted.lengths.tolist(), remaining, strict=True)]
        kept = tree.tokens[rows, accepted.path.clamp(min=0)][:, 1:].tolist()
        following = accepted.next_tokens.tolist()
        new = [[*kept[b][: counts[b] - 1], following[b]] if counts[b] else [] for b in range(batch)]
        new = _cut(new, remaining, ends)
        if record is not None:
            record.add(logits, scores, accepted.path, new)
        for text, tokens in zip(texts, new, strict=True):
            text += tokens
        if stop_check is not None:
            stop_check(texts, remaining, record)
            if record is not None:
                record.cut(texts)
        return accepted, counts

    def hand_on() -> list[list[int]]:
        """The new tokens that no criterion will cut back any more."""
        ready = [len(text) for text in texts] if stop_check is None else stop_check.ready(texts)
        new = [text[start:end] for text, start, end in zip(texts, given, ready, strict=True)]
        given[:] = ready
        return new

    cache = TreeCache(target.config, batch)
    logits, hidden = target.prefill(prompts, cache)
    # The first token is the law behind a tree of nothing but its root.
    nothing = TokenTree.chain(torch.zeros(batch, 1, dtype=torch.long, device=target.device))
    root = choose(nothing, logits[:, None])[0].next_tokens
    committed = Committed(nn.utils.rnn.pad_sequence(prompts, batch_first=True), hidden, cache.lengths[:])
    state = drafter.start(target, batch, drafting or sampling) if drafter is not None else None
    statistics.target_seconds += clock.lap()
    yield hand_on()
    while any(remaining):
        clock.lap()
        tree = (
            drafter.propose(state, committed, root, generator)
            if drafter is not None
            else TokenTree.chain(root[:, None])
        )
        # A last token needs no draft behind it.
        tree = target.readable(tree.up_to(max(remaining) - 1), cache)
        statistics.drafting_seconds += clock.lap()
        logits, hidden = target.verify(tree, cache)
        statistics.target_seconds += clock.lap()
        statistics.target_calls += 1
        statistics.drafted += tree.tokens.numel() - batch

        before = [len(text) for text in texts]
        accepted, counts = choose(tree, logits)
        cache.commit(accepted.path, counts)
        committed = _committed(tree, hidden, accepted, counts)
        root = accepted.next_tokens
        for emitted, text, length in zip(statistics.emitted, texts, before, strict=True):
            if len(text) > length:
                emitted.append(len(text) - length)
            elif len(text) < length:
                _shorten(emitted, len(text) - 1)
        yield hand_on()


def as_custom_generate(
    drafter: Drafter | None = None, acceptance: Acceptance | None = None, generator: torch.Generator | None = None
) -> Callable[..., Any]:
    """This engine as transformers' decoding loop: `model.generate(ids, custom_generate=as_custom_generate(drafter))`.

    The options of the call and of the model's generation config are kept to: processors at each node of a tree along its
    own path, so that the law stays exact, and stopping criteria token by token. With `return_dict_in_generate` the
    result holds scores and logits, and no cache. What a tree cannot do, such as beams, is refused. transformers hands no
    tokenizer to loops that are not its own: in place of `stop_strings` give `StopStringCriteria` among the criteria.

    Args:
        drafter: As for `generate`.
        acceptance: As for `generate`.
        generator: Source of randomness.

    Returns:
        A function to give as `custom_generate`; it raises ValueError for an option that it does not take.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        ...     eos_token_id=None,
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> decode = as_custom_generate()
        >>> model.generate(ids, custom_generate=decode, max_new_tokens=4, repetition_penalty=1.2).shape
        torch.Size([1, 7])
    """

    def decode(model: nn.Module, input_ids: Tensor, **options: Any) -> Tensor | GenerateDecoderOnlyOutput:
        result, record = generate_as_asked(model, input_ids, drafter, acceptance, generator, **options)
        config = options["generation_config"]
        if not config.return_dict_in_generate:
            return result.sequences
        steps = {} if record is None else record.steps(result.sequences.shape[1] - input_ids.shape[1])
        asked = {name: step for name, step in steps.items() if getattr(config, f"output_{name}")}
        return GenerateDecoderOnlyOutput(sequences=result.sequences, **asked)

    return decode


def generate_as_asked(
    model: nn.Module,
    input_ids: Tensor,
    drafter: Drafter | None,
    acceptance: Acceptance | None,
    generator: torch.Generator | None,
    **options: Any,
) -> tuple[Generation, Record | None]:
    """Continue prompts as transformers' `generate` asks a decoding loop to; for within such a call.

    Returns:
        The `Generation`, and the logits of its steps where these are wanted.
    """
    asked = asked_of_generate(input_ids, withheld=withheld_arguments(), **options)
    if asked.streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer prints one prompt, got {len(input_ids)}: generate them one by one")
    statistics, record = Statistics(), Record(asked.pad) if asked.keep else None
    steps = _steps(
        model,
        input_ids,
        attention_mask=options.get("attention_mask"),
        drafter=drafter,
        acceptance=acceptance,
        max_new_tokens=asked.max_new_tokens,
        sampling=asked.sampling,
        drafting=asked.drafting,
        logits_processor=asked.processors,
        stopping_criteria=asked.criteria,
        ends=set(asked.ends),
        pad=asked.pad,
        generator=generator,
        statistics=statistics,
        record=record,
    )
    # transformers has given the prompt to the streamer.
    return _gather(steps, input_ids, statistics, asked.pad, asked.streamer), record


def as_prompts(input_ids: Any) -> Tensor:
    """Prompts as a tensor with a row for each; one prompt may be given without a batch.

    Raises:
        TypeError: no tensor, such as all that a tokenizer returns.
    """
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor of token ids, got {type(input_ids).__name__}: give "
            "tokenizer(text, return_tensors='pt').input_ids, and its attention_mask where prompts are padded"
        )
    return input_ids[None] if input_ids.ndim == 1 else input_ids


def split_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The prompts of a padded batch, each without its padding, in int64.

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
    # Ids are used as indices, which int32 cannot be everywhere.
    input_ids = input_ids.long()
    if attention_mask is None:
        return list(input_ids)
    return [row[keep.bool()] for row, keep in zip(input_ids, attention_mask, strict=True)]


def _left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The prompts as they were given, but padded on the left."""
    if attention_mask is None:
        return input_ids
    order = attention_mask.bool().int().argsort(dim=1, stable=True).to(input_ids.device)
    return input_ids.gather(1, order)


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
    target.check_texts([len(prompt) for prompt in prompts], max_new_tokens)


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


def _shorten(emitted: list[int], total: int) -> None:
    """Take back what the latest calls gave beyond `total` tokens."""
    while (excess := sum(emitted) - total) > 0:
        last = emitted.pop()
        if last > excess:
            emitted.append(last - excess)


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
