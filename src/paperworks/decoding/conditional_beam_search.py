"""ConditionalBeamSearch: text that is likely and has an attribute; and exact modes (arXiv 2311.08817, 2408.16241)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.engine import as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.options import asked_of_generate, withheld_arguments
from paperworks.decoding.sampling import check_logits
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree

# log p(a | prefix), (...), from the model's state behind each prefix, (..., d), and its new tokens, (..., length).
Classifier = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Hypotheses:
    """The continuations of each prompt that a search found, best first.

    Attributes:
        sequences: Prompt (as given, padding included) and continuation, (batch, beams, length), padded on the right.
        new_tokens: `new_tokens[b][i]` is continuation i of prompt b, end-of-sequence token included where one came.
        scores: What they are ranked by, (batch, beams); minus infinity where fewer were found.
        log_likelihoods: log p(x) in nats, (batch, beams).
        log_attributes: log p(a | x) by the classifier, (batch, beams).
        target_calls: Passes of the model after the prompt's.
    """

    sequences: Tensor
    new_tokens: list[list[list[int]]]
    scores: Tensor
    log_likelihoods: Tensor
    log_attributes: Tensor
    target_calls: int


class ConditionalBeamSearch:
    """Beam search for the mode of log p(x | a), what is most likely among texts with an attribute (arXiv 2311.08817).

    The most likely texts of a language model are often degenerate: empty, endless or repetitive. They are no longer the
    most likely ones once conditioned on not being so. As log p(a) is the same for all texts, a beam is ranked by

        log p(x_<=t) + weight * log p(a | x_<=t).

    At each step every beam is expanded with its most likely tokens, the model reads all these candidates in one pass, and
    the classifier judges the prefix that ends in each from the model's own state there. The states of the best are those
    that the next step needs: a step costs one pass, of num_beams * candidates tokens a prompt. Everything else is as in
    transformers' beam search, which `weight=0` gives.

    Args:
        model: A transformers causal LM (Llama, Qwen2, Qwen3, Gemma3 and others alike).
        classifier: log p(a | prefix); see `AttributeClassifier` for one that can be trained. Any function of the model's
            states (batch, beams, candidates, d) and the new tokens (batch, beams, candidates, length) will do that
            returns log-probabilities (batch, beams, candidates).
        num_beams: Beams B of a prompt.
        weight: Of the classifier; 1 is Bayes' rule.
        candidates: Tokens that each beam is expanded with; 2 * num_beams if None, or the whole vocabulary if that is less.
        length_penalty: Finished texts are ranked by score / length ** length_penalty. With 0 the score is that of the
            paper; transformers' default is 1.

    Raises:
        TypeError: not a causal language model.
        ValueError: a value out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        ...     eos_token_id=None,
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> def few_sevens(hidden, tokens):  # a hand-written attribute
        ...     return -5.0 * (tokens == 7).sum(-1)
        >>> search = ConditionalBeamSearch(model, few_sevens, num_beams=3)
        >>> found = search.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=[])
        >>> found.sequences.shape, found.target_calls
        (torch.Size([1, 3, 7]), 4)
        >>> model.generate(torch.tensor([[1, 2, 3]]), custom_generate=search.custom_generate, max_new_tokens=4).shape
        torch.Size([1, 7])
    """

    def __init__(
        self,
        model: nn.Module,
        classifier: Classifier,
        *,
        num_beams: int = 5,
        weight: float = 1.0,
        candidates: int | None = None,
        length_penalty: float = 0.0,
    ) -> None:
        if not callable(classifier):
            raise TypeError(
                f"classifier must be a function of hidden states and tokens, got {type(classifier).__name__}"
            )
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a number from 0 on, got {weight}")
        vocabulary = Target(model).vocab_size
        if candidates is not None and not 1 <= candidates <= vocabulary:
            raise ValueError(f"candidates must be between 1 and the vocabulary ({vocabulary}), got {candidates}")
        self.model = model
        self.classifier = classifier
        self.num_beams = num_beams
        self.weight = weight
        self.candidates = candidates if candidates is not None else min(2 * num_beams, vocabulary)
        self.length_penalty = length_penalty

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int = 0,
    ) -> Hypotheses:
        """Search for continuations of each prompt.

        Args:
            input_ids: Prompts, shape (batch, length) or (length,).
            attention_mask: 0 where a prompt is padding, on either side; shape of `input_ids`.
            max_new_tokens: Tokens to add at most; a text that reaches it without an end counts as it is.
            eos_token_id: Token or tokens that end a text; the model's generation config has the say if None, [] for
                none.
            pad_token_id: Fills texts that ended early.

        Raises:
            ValueError: empty prompt, max_new_tokens below 1, a prompt longer than the context, NaN logits, no candidate
                but end tokens, or a classifier whose results are not log-probabilities of the shape expected.
        """
        input_ids = as_prompts(input_ids)
        target, beams = Target(self.model), self.num_beams
        prompts = split_prompts(input_ids, attention_mask)
        check_lengths(target, prompts, max_new_tokens)
        ends = torch.tensor(sorted(end_tokens(self.model, eos_token_id)), dtype=torch.long, device=target.device)
        if self.candidates <= len(ends):
            raise ValueError(
                f"candidates must be more than the {len(ends)} end tokens, so that a text can go on, got {self.candidates}"
            )
        cache = TreeCache(target.config, len(prompts))
        logits, _ = target.prefill(prompts, cache)
        cache.select([row for row in range(len(prompts)) for _ in range(beams)])
        law = _log_law(logits)[:, None].expand(-1, beams, -1)
        tokens = torch.empty(len(prompts), beams, 0, dtype=torch.long, device=target.device)
        # The beams begin alike: only the first has successors, or all would take the same token.
        log_p = law.new_full((len(prompts), beams), -torch.inf)
        log_p[:, 0] = 0.0
        nothing = torch.full_like(log_p, -torch.inf)
        empty = tokens.new_full((len(prompts), beams, max_new_tokens), pad_token_id)
        finished = _Finished(nothing, nothing.clone(), nothing.clone(), empty, torch.zeros_like(empty[..., 0]))
        searching = torch.arange(len(prompts), device=target.device)
        for length in range(1, max_new_tokens + 1):
            # Expand every beam, read all candidates, judge them.
            steps, token = law.topk(self.candidates, dim=-1)
            log_p = (log_p[..., None] + steps).flatten(1)
            tokens = torch.cat([tokens[:, :, None].expand(-1, -1, self.candidates, -1), token[..., None]], dim=-1)
            siblings = token.flatten(0, 1)
            logits, hidden = target.verify(TokenTree(siblings, torch.full_like(siblings, -1)), cache)
            log_a = self._judge(hidden.view(*token.shape, -1), tokens).flatten(1)
            score = log_p + self.weight * log_a if self.weight else log_p
            tokens = tokens.flatten(1, 2)

            # Of the best B, those that end are finished.
            ended = torch.isin(tokens[..., -1], ends) | (length == max_new_tokens)
            best = score.topk(beams, dim=1).indices
            rank = (score / length**self.length_penalty).masked_fill(~ended, -torch.inf)
            whole = F.pad(tokens, (0, max_new_tokens - length), value=pad_token_id)
            new = _Finished(rank, log_p, log_a, whole, torch.full_like(ended, length, dtype=torch.long)).take(best)
            merged = _Finished(*(torch.cat([old[searching], add], 1) for old, add in zip(finished, new, strict=True)))
            for old, kept in zip(finished, merged.take(merged.scores.topk(beams, dim=1).indices), strict=True):
                old[searching] = kept

            # The best B that do not end go on, where one of them may still be better than the worst finished.
            score, best = score.masked_fill(ended, -torch.inf).topk(beams, dim=1)
            log_p = _take(log_p, best).masked_fill(score == -torch.inf, -torch.inf)
            bound = log_p.amax(1) / length**self.length_penalty
            open_ = bound > finished.scores[searching].amin(1)
            if not bool(open_.any()):
                break
            parent, sibling = best // self.candidates, best % self.candidates
            rows = torch.arange(len(best), device=best.device)[:, None] * beams + parent
            cache.select(rows[open_].flatten().tolist())
            cache.commit(sibling[open_].view(-1, 1), [1] * (int(open_.sum()) * beams))
            law = _log_law(_take(logits.view(len(best), -1, logits.shape[-1]), best)[open_])
            tokens, log_p, searching = _take(tokens, best)[open_], log_p[open_], searching[open_]
        return _hypotheses(finished, input_ids, pad_token_id, calls=length)

    def custom_generate(self, model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """The search as transformers' decoding loop: `model.generate(ids, custom_generate=search.custom_generate)`.

        Returns:
            The best continuation of each prompt behind it, (batch, length).

        Raises:
            ValueError: another model than the search's, no room for new tokens, or an option that the search does not keep
                to: beams of another number, sampling, logits processors, stopping criteria, a streamer, scores.
        """
        config = copy.copy(kwargs.pop("generation_config"))
        if model is not self.model:
            raise ValueError("this search was made for another model: make one for the model that generates")
        if config.num_beams not in (1, self.num_beams) or config.num_return_sequences != 1 or config.do_sample:
            raise ValueError(
                f"the search has {self.num_beams} beams of its own, returns the best text and samples nothing: leave "
                "num_beams, num_return_sequences and do_sample at their defaults"
            )
        if config.early_stopping or config.length_penalty not in (None, 1.0, self.length_penalty):
            raise ValueError(
                "the search has a length_penalty of its own and stops when nothing better can come: give none"
            )
        # transformers has repeated every prompt for its beams.
        step, config.num_beams = config.num_beams, 1
        rows = {"attention_mask": kwargs.get("attention_mask"), "position_ids": kwargs.get("position_ids")}
        kwargs |= {name: None if rest is None else rest[::step] for name, rest in rows.items()}
        input_ids = input_ids[::step]
        asked = asked_of_generate(input_ids, generation_config=config, withheld=withheld_arguments(), **kwargs)
        wanted = {
            "logits processors": asked.processors, "stopping criteria": asked.criteria, "streamers": asked.streamer,
            "return_dict_in_generate": config.return_dict_in_generate,
        }  # fmt: skip
        if refused := [name for name, value in wanted.items() if value]:
            raise ValueError(f"the search returns the best texts and takes no {' and no '.join(refused)}")
        return self.generate(
            input_ids,
            attention_mask=kwargs["attention_mask"],
            max_new_tokens=asked.max_new_tokens,
            eos_token_id=asked.ends,
            pad_token_id=asked.pad,
        ).sequences[:, 0]

    def _judge(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        log_a = self.classifier(hidden, tokens)
        if log_a.shape != tokens.shape[:-1] or not bool((log_a <= 1e-4).all()):
            raise ValueError(
                f"the classifier must return log-probabilities, at most 0, of shape {tuple(tokens.shape[:-1])}, got shape "
                f"{tuple(log_a.shape)} with a largest value of {float(log_a.max()) if log_a.numel() else None}"
            )
        return log_a.to(torch.promote_types(log_a.dtype, torch.float32))


@dataclass(frozen=True)
class Mode:
    """The most likely text that `exact_mode` found.

    Attributes:
        tokens: Its tokens, end token included.
        log_probability: log p of them all in nats.
        proven: Whether the search went through all that could be more likely.
        target_calls: Passes of the model after the prompt's.
    """

    tokens: list[int]
    log_probability: float
    proven: bool
    target_calls: int


@torch.inference_mode()
def exact_mode(
    model: nn.Module,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    length: int | None = None,
    eos_token_id: int | list[int] | None = None,
    width: int = 16,
    max_calls: int | None = None,
) -> Mode:
    """The one most likely finished text behind a prompt, by depth-first branch and bound (arXiv 2311.08817).

    A text's log-probability only falls as it grows, so that no text can be better than the best one known if its
    beginning is worse. Likely beginnings are searched first. Without a length the mode of a language model is often the
    empty text; with one it is the mode among texts of that length.

    Args:
        model: A transformers causal LM.
        input_ids: The prompt, (1, length) or (length,).
        max_new_tokens: Tokens of a text at most, its end token included.
        length: Tokens before the end token that the text must have; any number if None.
        eos_token_id: Token or tokens that end a text; the model's generation config has the say if None.
        width: Beginnings that are read in one pass.
        max_calls: Give up after so many passes; None never does. The time may grow exponentially with the length.

    Returns:
        A `Mode`. The empty text is an end token alone.

    Raises:
        ValueError: several prompts or an empty one, one longer than the context, no end token, a length that does not
            leave room for it, or NaN logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> exact_mode(model, torch.tensor([1, 2, 3]), max_new_tokens=8, eos_token_id=0).tokens
        [0]
        >>> mode = exact_mode(model, torch.tensor([1, 2, 3]), max_new_tokens=8, length=2, eos_token_id=0)
        >>> len(mode.tokens), mode.tokens[-1]
        (3, 0)
    """
    prompts = split_prompts(as_prompts(input_ids), None)
    target = Target(model)
    check_lengths(target, prompts, max_new_tokens)
    ends = torch.tensor(sorted(end_tokens(model, eos_token_id)), dtype=torch.long, device=target.device)
    if len(prompts) > 1 or not len(ends):
        raise ValueError(f"expected one prompt and an end token, got {len(prompts)} prompts and {len(ends)} end tokens")
    deepest = max_new_tokens - 1 if length is None else length
    if not 0 <= deepest < max_new_tokens:
        raise ValueError(f"length must be from 0 to max_new_tokens - 1 = {max_new_tokens - 1}, got {length}")
    if width < 1 or (max_calls is not None and max_calls < 1):
        raise ValueError(f"width and max_calls must be at least 1, got {width} and {max_calls}")
    cache = TreeCache(target.config, 1)
    joint = _log_law(target.prefill(prompts, cache)[0])
    texts: list[list[int]] = [[]]
    best, mode = -torch.inf, list[int]()
    # Beginnings and the log-probability of each followed by each token, the most likely beginning last.
    pending: list[tuple[list[int], Tensor]] = []
    calls = 0
    while True:
        ended = joint[:, ends]
        if length in (None, len(texts[0])) and float(ended.max()) > best:
            row, end = divmod(int(ended.argmax()), len(ends))
            best, mode = float(ended.max()), [*texts[row], int(ends[end])]
        if len(texts[0]) < deepest:
            joint[:, ends] = -torch.inf
            pending += reversed([*zip(texts, joint, strict=True)])
        alive = torch.zeros(1, dtype=torch.bool)
        while pending and not bool(alive.any()):
            text, successors = pending.pop()
            scores, tokens = successors.topk(min(width, len(successors)))
            alive = scores > best
        if not bool(alive.any()) or calls == max_calls:
            return Mode(mode, best, proven=not bool(alive.any()), target_calls=calls)
        if bool(alive.all()):
            successors[tokens] = -torch.inf
            pending.append((text, successors))
        scores, tokens = scores[alive], tokens[alive]
        # The last token of the beginning is read again, as the root of those that follow: what it wrote into the cache
        # may have been overwritten, but what lies before it has not.
        cache.lengths[:] = [len(prompts[0]) + len(text) - 1]
        root = prompts[0][-1:].to(tokens) if not text else tokens.new_tensor(text[-1:])
        parents = torch.zeros(1, len(tokens) + 1, dtype=torch.long, device=target.device)
        parents[0, 0] = -1
        logits, _ = target.verify(TokenTree(torch.cat([root, tokens])[None], parents), cache)
        calls += 1
        texts = [[*text, token] for token in tokens.tolist()]
        joint = scores[:, None] + _log_law(logits[0, 1:])


class _Finished(NamedTuple):
    """Texts of each prompt, (batch, n); `tokens` are (batch, n, length)."""

    scores: Tensor
    log_p: Tensor
    log_a: Tensor
    tokens: Tensor
    lengths: Tensor

    def take(self, index: Tensor) -> _Finished:
        """Those at `index` (batch, m)."""
        return _Finished(*(_take(tensor, index) for tensor in self))


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    """Entries `index` (batch, m) of `tensor` (batch, n, ...)."""
    return tensor[torch.arange(len(index), device=index.device)[:, None], index]


def _log_law(logits: Tensor) -> Tensor:
    check_logits(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _hypotheses(finished: _Finished, input_ids: Tensor, pad: int, calls: int) -> Hypotheses:
    found = finished.scores > -torch.inf
    lengths = finished.lengths.where(found, 0)
    tokens = finished.tokens[..., : int(lengths.max())].where(found[..., None], pad).to(input_ids)
    return Hypotheses(
        sequences=torch.cat([input_ids[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=-1),
        new_tokens=[
            [text[:length] for text, length in zip(*row, strict=True)]
            for row in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ],
        scores=finished.scores,
        log_likelihoods=finished.log_p,
        log_attributes=finished.log_a,
        target_calls=calls,
    )
