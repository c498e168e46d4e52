"""What transformers' `generate` may be told of a text, kept to at every node of a token tree."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerationMode
from transformers.generation.logits_process import WhisperNoSpeechDetection

from paperworks.decoding.sampling import Sampling
from paperworks.decoding.tree import TokenTree

# Processors that remember what they were called with; a tree asks about texts that are never written.
_STATEFUL = {
    SynthIDTextWatermarkLogitsProcessor: "use a WatermarkingConfig, whose marks depend on the text alone",
    UnbatchedClassifierFreeGuidanceLogitsProcessor: "use ClassifierFreeGuidance, which is a model of its own",
    WhisperNoSpeechDetection: "it is made for speech",
}

# Fields of a GenerationConfig that ask for something else than a text of the model's own law: what they may be, and why
# nothing else. All other fields are processors, stopping criteria, or mean nothing without one of these.
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "num_beams": ((None, 1), "a token tree is no beam search: see ConditionalBeamSearch, or leave drafting out"),
    "num_beam_groups": ((None, 1), "a token tree is no beam search"),
    "constraints": ((None,), "they need a beam search"),
    "force_words_ids": ((None,), "they need a beam search"),
    "penalty_alpha": ((None, 0), "that is contrastive search"),
    "dola_layers": ((None,), "that decodes by other layers"),
    "prompt_lookup_num_tokens": ((None,), "the drafter is the one given to as_custom_generate"),
    "assistant_early_exit": ((None,), "the drafter is the one given to as_custom_generate"),
    "use_mtp": ((None, False), "the drafter is the one given to as_custom_generate"),
    "speculation_type": ((None,), "the drafter is the one given to as_custom_generate"),
    "is_assistant": ((None, False), "a tree is not drafted for another model"),
    "guidance_scale": ((None, 1), "use ClassifierFreeGuidance, which is a model of its own"),
    "use_cache": ((None, True), "a tree lives in the key-value cache"),
    "cache_implementation": ((None, "dynamic"), "a tree has a cache of its own"),
    "prefill_chunk_size": ((None,), "the prompt is read in one pass"),
    "output_attentions": ((None, False), "a pass reads a whole tree, whose attention is not that of a text"),
    "output_hidden_states": ((None, False), "a pass reads a whole tree, whose states are not those of a text"),
}
# What transformers hands to every loop.
_KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def as_processors(given: Any) -> LogitsProcessorList:
    """Logits processors as transformers' list, from a list or a single one.

    Raises:
        TypeError: something that cannot be called.
        ValueError: a processor that remembers earlier calls.
    """
    processors = LogitsProcessorList(_listed(given, "logits_processor"))
    for processor in processors:
        for kind, instead in _STATEFUL.items():
            if isinstance(processor, kind):
                raise ValueError(
                    f"{kind.__name__} remembers the text it was called with, but drafting asks about many texts that are "
                    f"never written: {instead}"
                )
    return processors


def as_criteria(given: Any) -> StoppingCriteriaList:
    """Stopping criteria as transformers' list, from a list or a single one.

    Raises:
        TypeError: something that cannot be called.
    """
    return StoppingCriteriaList(_listed(given, "stopping_criteria"))


def _listed(given: Any, name: str) -> list[Any]:
    functions = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
    for function in functions:
        if not callable(function):
            raise TypeError(f"{name} must be a function of token ids and scores or a list of them, got {function!r}")
    return functions


class TreeProcessors:
    """Logits processors over token trees: at each node they see the text that leads there.

    They are called with as many rows as there are prompts, row b being a text of prompt b, since some know their rows by
    number. A row that has nothing to ask is filled up, as transformers fills up a row that has ended.

    Args:
        processors: What to apply.
        prompts: (batch, length), padded on the left.
        pad: Fills rows up.
    """

    def __init__(self, processors: LogitsProcessorList, prompts: Tensor, pad: int) -> None:
        self.processors, self.prompts, self.pad = processors, prompts, pad

    def __call__(self, tree: TokenTree, logits: Tensor, texts: list[list[int]], remaining: list[int]) -> Tensor:
        """Processed logits (batch, nodes, vocab), in float32 as in transformers (float64 for float64).

        A node whose own token has become impossible can never be accepted; its logits are left at 0.

        Args:
            tree: The tree.
            logits: The target's, (batch, nodes, vocab).
            texts: New tokens of each row, the tree's root among them.
            remaining: How many may follow; a row of 0 has ended, and nothing is asked about it.
        """
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = torch.zeros_like(wide)
        rows = torch.arange(len(scores), device=scores.device)[:, None]
        depths, parents, tokens = tree.depths.tolist(), tree.parents.tolist(), tree.tokens.tolist()
        paths: list[dict[int, list[int]]] = [{0: []} if left else {} for left in remaining]
        for depth in range(int(tree.depths.max()) + 1):
            if depth:
                possible = (scores[rows, tree.parents.clamp(min=0), tree.tokens] > -torch.inf).tolist()
                for row, known in enumerate(paths):
                    for node, parent in enumerate(parents[row]):
                        if depths[row][node] == depth and possible[row][node] and parent in known:
                            known[node] = [*known[parent], tokens[row][node]]
            # Nodes by the length of the text that leads to them, since one call is for texts of one length.
            asking: dict[int, list[list[int]]] = defaultdict(lambda: [[] for _ in texts])
            for row, (text, known) in enumerate(zip(texts, paths, strict=True)):
                for node in known:
                    if depths[row][node] == depth:
                        asking[len(text) + depth][row].append(node)
            for length, nodes in asking.items():
                for asked in zip_longest(*nodes):
                    self._process(wide, scores, texts, paths, asked, length)
        return scores

    def _process(
        self,
        wide: Tensor,
        scores: Tensor,
        texts: list[list[int]],
        paths: list[dict[int, list[int]]],
        asked: tuple[int | None, ...],
        length: int,
    ) -> None:
        """Process one node of each row, or none, to which `length` new tokens lead: from `wide` into `scores`."""
        behind = [
            [*text, *([self.pad] * length if node is None else path[node])][:length]
            for text, path, node in zip(texts, paths, asked, strict=True)
        ]
        ids = torch.cat([self.prompts, self.prompts.new_tensor(behind).view(len(behind), length)], dim=1)
        nodes = [node or 0 for node in asked]
        given = wide[range(len(nodes)), nodes]
        processed = self.processors(ids, given)
        if processed.shape != given.shape:
            raise ValueError(
                f"a logits processor must return scores of the shape it was given, {tuple(given.shape)}, got "
                f"{tuple(processed.shape)}"
            )
        for row, node in enumerate(asked):
            if node is not None:
                scores[row, node] = processed[row]


@dataclass
class Record:
    """Logits behind which each new token of each row was chosen, (vocab,) each: the model's, and as processed.

    Args:
        pad: Fills rows up; behind a row's end its law is certain of that.
    """

    pad: int
    logits: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)

    def add(self, logits: Tensor, scores: Tensor, path: Tensor, new: list[list[int]]) -> None:
        """Keep those (batch, nodes, vocab) at the nodes of `path` (batch, depth) behind which `new` tokens came."""
        self.logits = self.logits or [[] for _ in new]
        self.scores = self.scores or [[] for _ in new]
        for row, tokens in enumerate(new):
            for node in path[row, : len(tokens)].tolist():
                self.logits[row].append(logits[row, node].to(scores.dtype))
                self.scores[row].append(scores[row, node])

    def cut(self, texts: list[list[int]]) -> None:
        """Drop those of tokens that are in the texts no more."""
        for kept in (self.logits, self.scores):
            for row, text in zip(kept, texts, strict=True):
                del row[len(text) :]

    def steps(self, length: int) -> dict[str, tuple[Tensor, ...]]:
        """Both as transformers returns them: (batch, vocab) for each of `length` new tokens."""
        both = {"logits": self.logits, "scores": self.scores}
        return {name: tuple(self.step(kept, t) for t in range(length)) for name, kept in both.items()}

    def step(self, kept: list[list[Tensor]], index: int) -> Tensor:
        """One of these steps, (batch, vocab)."""
        nothing = torch.full_like(next(row[0] for row in kept if row), -torch.inf)
        nothing[self.pad] = 0.0
        return torch.stack([row[index] if index < len(row) else nothing for row in kept])


class StopCheck:
    """Stopping criteria over rows that are not equally long.

    The criteria see what they see in transformers: token by token, all rows with as many new tokens, those that have
    ended filled up. A row that is ahead of the others is looked at when these have come as far, and cut back if it had
    to stop. Without end tokens nothing fills up: a row that has stopped goes on until all have, as in transformers.

    Args:
        criteria: What to ask.
        prompts: (batch, length), padded on the left.
        pad: Fills rows up.
        fill: Whether rows that have ended are filled up.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: Tensor, pad: int, *, fill: bool) -> None:
        self.criteria, self.prompts, self.pad, self.fill = criteria, prompts, pad, fill
        self.seen = 0
        self.stopped = [False] * len(prompts)
        self.scores: tuple[Tensor, ...] = ()

    def __call__(self, texts: list[list[int]], remaining: list[int], record: Record | None) -> None:
        """Look at all that can be looked at; shortens `texts` and sets `remaining` to 0 where a row has to stop."""
        while not all(self.stopped) and all(
            len(text) > self.seen or not left for text, left in zip(texts, remaining, strict=True)
        ):
            self.seen += 1
            behind = [[*text, *[self.pad] * self.seen][: self.seen] for text in texts]
            ids = torch.cat([self.prompts, self.prompts.new_tensor(behind)], dim=1)
            if record is not None:
                self.scores += (record.step(record.scores, self.seen - 1),)
            # What transformers gives, too, where scores are not asked for: nothing.
            stops = self.criteria(ids, self.scores or None)
            for row, stop in enumerate(stops.tolist()):
                ended = not remaining[row] and len(texts[row]) <= self.seen
                if stop and self.fill and not self.stopped[row]:
                    self._cut(texts, remaining, row)
                self.stopped[row] |= stop or ended
            if not self.fill and all(self.stopped):
                for row in range(len(texts)):
                    self._cut(texts, remaining, row)

    def _cut(self, texts: list[list[int]], remaining: list[int], row: int) -> None:
        del texts[row][self.seen :]
        remaining[row] = 0

    def ready(self, texts: list[list[int]]) -> list[int]:
        """How many tokens of each row will not be cut back any more."""
        return [len(text) if all(self.stopped) else min(len(text), self.seen) for text in texts]


class Asked(NamedTuple):
    """What a call of transformers' `generate` asks for.

    Attributes:
        max_new_tokens: Tokens to add at most.
        ends: Tokens that end a row.
        pad: Fills rows that ended early.
        processors: Logits processors to apply at each node.
        criteria: Stopping criteria, but for lengths and end tokens.
        sampling: What remains to be done to processed logits.
        drafting: What the law is most like, for drafters that sample.
        streamer: Where tokens go as they come.
        keep: Whether the logits of all steps are wanted.
    """

    max_new_tokens: int
    ends: list[int]
    pad: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sampling: Sampling
    drafting: Sampling
    streamer: Any
    keep: bool


def asked_of_generate(
    input_ids: Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    withheld: dict[str, Any],
    **others: Any,
) -> Asked:
    """Sort out what transformers' `generate` hands to a decoding loop.

    Args:
        input_ids: The prompts, padding included.
        generation_config: The call's, the model's own where the call leaves it open, and defaults.
        logits_processor: All processors that these and the call ask for, samplers' warpers last.
        stopping_criteria: All criteria likewise.
        withheld: See `withheld_arguments`.
        **others: What else the model would be given.

    Raises:
        ValueError: something is asked for that tree decoding cannot do.
    """
    config = generation_config
    refuse(config)
    _refuse_arguments(others, withheld)
    _check_positions(others.get("position_ids"), others.get("attention_mask"), input_ids)
    length = input_ids.shape[1]
    limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    if not limits:
        raise ValueError("max_new_tokens must be at least 1, got no limit: give max_new_tokens")
    ends = [
        token
        for criterion in stopping_criteria
        if isinstance(criterion, EosTokenCriteria)
        for token in criterion.eos_token_id.flatten().tolist()
    ]
    rest = [
        criterion for criterion in stopping_criteria if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria))
    ]
    pad = getattr(config, "_pad_token_tensor", None)
    keep = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
    top_k = min(config.top_k or 0, 2**31) or None
    drafting = Sampling(config.temperature or 1.0, top_k, config.top_p) if config.do_sample else Sampling()
    processors, sampling = _split(logits_processor, config.do_sample, apart=not keep)
    return Asked(
        # transformers looks at the length behind the first new token.
        max_new_tokens=max(1, min(limits) - length),
        ends=ends,
        pad=0 if pad is None else int(pad),
        processors=as_processors(processors),
        criteria=as_criteria(rest),
        sampling=sampling,
        drafting=drafting,
        streamer=withheld.get("streamer"),
        keep=keep,
    )


def _split(processors: LogitsProcessorList, sample: bool, *, apart: bool) -> tuple[LogitsProcessorList, Sampling]:
    """Processors, and apart from them temperature, top-k and top-p where they come last: these need no text."""
    if not sample:
        return processors, Sampling()
    rest, found = list(processors), dict[str, Any]()
    kinds: list[tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = [
        ("top_p", lambda p: type(p) is TopPLogitsWarper and p.min_tokens_to_keep == 1, lambda p: p.top_p),
        ("top_k", lambda p: type(p) is TopKLogitsWarper, lambda p: p.top_k),
        ("temperature", lambda p: type(p) is TemperatureLogitsWarper, lambda p: p.temperature),
    ]
    for name, fits, value in kinds if apart else []:
        if rest and fits(rest[-1]) and getattr(rest[-1], "filter_value", -torch.inf) == -torch.inf:
            found[name] = value(rest.pop())
    return LogitsProcessorList(rest), Sampling(**{"temperature": 1.0, **found})


def refuse(config: GenerationConfig) -> None:
    """Raise ValueError for what tree decoding cannot do, saying which option asks for it."""
    for name, (fine, why) in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in fine:
            raise ValueError(f"tree decoding does not take {name}={value!r}: {why}")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"tree decoding is greedy or sampling, but the options given ask for {mode.value}")


def _refuse_arguments(others: dict[str, Any], withheld: dict[str, Any]) -> None:
    for name in ("assistant_model", "synced_gpus"):
        if withheld.get(name):
            raise ValueError(f"tree decoding does not take {name}: the drafter is the one given to as_custom_generate")
    cache = others.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length()):
        raise ValueError(
            "tree decoding does not take past_key_values: it reads the whole prompt into a cache of its own"
        )
    unknown = sorted(name for name, value in others.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise ValueError(f"tree decoding gives a model token ids alone, and does not take {', '.join(unknown)}")


def _check_positions(positions: Tensor | None, mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError for positions other than those of tokens one behind another."""
    if positions is None:
        return
    kept = torch.ones_like(input_ids) if mask is None else mask.long()
    usual = kept.cumsum(-1) - 1
    if positions.shape[-1] != usual.shape[-1] or bool(((positions != usual) & (kept > 0)).any()):
        raise ValueError("tree decoding does not take position_ids: the tokens of a prompt stand one behind another")


def withheld_arguments() -> dict[str, Any]:
    """Arguments of the call of transformers' `generate` that is under way, with those that it keeps to itself.

    It hands no streamer, assistant model or the like to a loop that is not its own. To ignore them without a word would
    be worse than to look at its frame.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    names = ("streamer", "assistant_model", "synced_gpus")
    return {} if frame is None else {name: frame.f_locals.get(name) for name in names}
