"""Superposed Decoding: several drafts of a prompt from the passes of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.engine import as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.ngram import NGramModel
from paperworks.decoding.sampling import check_logits
from paperworks.decoding.target import Target

# Added to the score of a token that the n-gram model rules out. Finite, so that there are k drafts even where it leaves
# fewer, in the order of what the model says.
_RULED_OUT = -1e9


@dataclass(frozen=True)
class Drafts:
    """The k drafts of each prompt, of those that ended and those that did not, by perplexity, best first.

    Attributes:
        sequences: Prompt (as given, padding included) and draft, (batch, drafts, length), padded on the right.
        new_tokens: `new_tokens[b][i]` is draft i of prompt b, end-of-sequence token included where one came.
        finished: Whether a draft ended by an end-of-sequence token, (batch, drafts).
        scores: Summed log-scores, interpolated with the n-gram model's where there is one, (batch, drafts), float64;
            minus infinity for a draft that the n-gram model rules out, kept where fewer than k others are left.
        perplexities: exp(-score / tokens), (batch, drafts): of these scores, not of the model at temperature 1.
        target_calls: Passes of the model, the prompt's included.
    """

    sequences: Tensor
    new_tokens: list[list[list[int]]]
    finished: Tensor
    scores: Tensor
    perplexities: Tensor
    target_calls: int


class SuperposedDecoding:
    """Several short continuations of a prompt for the model passes of one (arXiv 2405.18400).

    At each step the model reads one embedding: the mean of the drafts' newest tokens' embeddings, weighted by the drafts'
    probabilities. Its one law of the next token serves all drafts; an n-gram model, which sees each draft's own last
    tokens, tells which of them a token may join:

        score_i(v) = (1 - alpha) log p(v) + alpha log sum_o weights_o P_o(v | last o tokens of draft i).

    P_o are the n-gram model's probabilities; a token that it has not seen behind a draft is out, unless that holds for
    all. The best k of all (draft, token) pairs are the new drafts. They share one key and value a step, so that quality
    falls as they drift apart: ask for ten or twenty tokens.

    Args:
        model: A transformers causal LM (Llama, Qwen2, Qwen3, Gemma3 and others alike).
        drafts: Continuations of each prompt, k.
        ngram: Counts over a corpus in the model's tokens; without them a token scores the same behind all drafts.
        alpha: Share of the n-gram model in the scores, within (0, 1]; with 1 the model only says which tokens to score.
        temperature: Divides the logits, which widens the scores too: tune it together with `alpha`.
        top_tokens: Tokens of the law to consider, with probabilities renormalised over them; the paper takes 3 k.
        weights: Of the n-gram orders, conditioned on 1, 2, ... tokens. They need not sum to 1.
        penalty: Taken off the score of a draft that the n-gram model cannot continue with any of the tokens, in nats.

    Raises:
        TypeError: not a causal language model.
        ValueError: a value outside its range, more weights than the n-gram model has orders, or an n-gram model of
            another tokenizer.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> ngram = NGramModel().fit([[1, 2, 3, 4, 5], [3, 4, 6, 7]])
        >>> drafts = SuperposedDecoding(model, drafts=3, ngram=ngram).generate(torch.tensor([[1, 2, 3]]))
        >>> drafts.sequences.shape, drafts.target_calls
        (torch.Size([1, 3, 13]), 10)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        drafts: int = 3,
        ngram: NGramModel | None = None,
        alpha: float = 0.54,
        temperature: float = 0.06,
        top_tokens: int = 9,
        weights: Sequence[float] = (0.01, 0.04, 0.15, 0.18, 0.12),
        penalty: float = 200.0,
    ) -> None:
        if drafts < 1:
            raise ValueError(f"drafts must be at least 1, got {drafts}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {temperature}; the paper takes 0.06 to 0.1")
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha must be within (0, 1], got {alpha}; for no n-gram model leave ngram out")
        if not 0 <= penalty < -_RULED_OUT:
            raise ValueError(f"penalty must be a number of nats from 0 on, got {penalty}")
        if not weights or (ngram is not None and len(weights) >= ngram.max_order):
            raise ValueError(
                "weights are those of contexts of 1, 2, ... tokens: give at least one, and fewer than the n-gram model's "
                f"max_order, got {len(weights)}"
            )
        if not all(0 <= weight < float("inf") for weight in weights):
            raise ValueError(f"weights must be finite and not negative, got {tuple(weights)}")
        vocab_size = Target(model).vocab_size
        if ngram is not None and ngram.vocab_size > vocab_size:
            raise ValueError(
                f"the n-gram model holds token ids up to {ngram.vocab_size - 1}, beyond the model's {vocab_size} tokens: "
                "fit it on text in the model's own tokenizer"
            )
        if not drafts <= top_tokens <= vocab_size:
            raise ValueError(
                f"top_tokens must be between drafts ({drafts}) and the vocabulary ({vocab_size}), got {top_tokens}"
            )
        self.model = model
        self.drafts = drafts
        self.ngram = ngram
        self.alpha = alpha
        self.temperature = temperature
        self.top_tokens = top_tokens
        self.weights = tuple(weights)
        self.penalty = penalty

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 10,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int = 0,
    ) -> Drafts:
        """Write the drafts of each prompt.

        Args:
            input_ids: Prompts, shape (batch, length) or (length,).
            attention_mask: 0 where a prompt is padding, on either side; shape of `input_ids`.
            max_new_tokens: Tokens of a draft at most.
            eos_token_id: Token or tokens that end a draft; the model's generation config has the say if None, [] for
                none.
            pad_token_id: Fills drafts that ended early.

        Raises:
            ValueError: empty prompt, max_new_tokens below 1, a prompt longer than the context, NaN logits, or fewer
                `top_tokens` than drafts and end tokens.
        """
        input_ids = as_prompts(input_ids)
        target = Target(self.model)
        prompts = split_prompts(input_ids, attention_mask)
        check_lengths(target, prompts, max_new_tokens)
        ends = torch.tensor(sorted(end_tokens(self.model, eos_token_id)), dtype=torch.long, device=target.device)
        if self.top_tokens < self.drafts + len(ends):
            raise ValueError(
                f"top_tokens must be at least {self.drafts + len(ends)}, so that {self.drafts} drafts can go on whatever "
                f"ends, got {self.top_tokens}"
            )
        beam = Beam.start(self._contexts(prompts).to(target.device), self.drafts, max_new_tokens, pad_token_id)
        cache = TreeCache(target.config, len(prompts))
        logits, _ = target.prefill(prompts, cache)
        for step in range(max_new_tokens):
            if step:
                logits = _read(target, cache, superpose(target.embed(beam.newest), beam.scores))
            check_logits(logits)
            best, tokens = logits.topk(self.top_tokens, dim=-1)
            log_law = (best.double() / self.temperature).log_softmax(-1)
            beam.advance(tokens, self._score(beam, tokens, log_law), ends)
        return _result(beam, input_ids, target_calls=max_new_tokens)

    def _contexts(self, prompts: list[Tensor]) -> Tensor:
        """The last tokens of each prompt, as many as the n-gram model looks at, -1 to the left of a shorter one."""
        last = [prompt[-len(self.weights) :].flip(0) for prompt in prompts]
        return nn.utils.rnn.pad_sequence(last, batch_first=True, padding_value=-1).flip(1)

    def _score(self, beam: Beam, tokens: Tensor, log_law: Tensor) -> Tensor:
        """Log-scores (batch, k, m) of the tokens (batch, m) behind each draft, given their law (batch, m)."""
        log_law = log_law[:, None].expand(-1, self.drafts, -1)
        if self.ngram is None:
            return log_law
        context = beam.sequences[:, :, : beam.written][..., -len(self.weights) :].flatten(0, 1)
        orders = self.ngram.probabilities(context, tokens.repeat_interleave(self.drafts, dim=0))
        weights = orders.new_tensor(self.weights[: orders.shape[1]])
        chance = torch.einsum("o, nom -> nm", weights, orders.nan_to_num(0.0)).view_as(log_law)
        own = (1 - self.alpha) * log_law
        joined = (own + self.alpha * chance.log()).where(chance > 0, own + _RULED_OUT)
        return joined.where((chance > 0).any(-1, keepdim=True), own - self.penalty)


@dataclass
class Beam:
    """Running and finished drafts of a batch of prompts.

    Attributes:
        sequences: Tokens of the running drafts behind their prompts' ends, (batch, k, context + max_new_tokens).
        scores: Their summed log-scores, (batch, k).
        finished: Sequences of drafts that ended, best first, (batch, k, context + max_new_tokens).
        finished_scores: Their scores, minus infinity where there is none yet.
        lengths: How many new tokens those have, (batch, k).
        context: Tokens of the prompt at the head of each sequence.
        written: Tokens in the running sequences.
    """

    sequences: Tensor
    scores: Tensor
    finished: Tensor
    finished_scores: Tensor
    lengths: Tensor
    context: int
    written: int

    @classmethod
    def start(cls, contexts: Tensor, drafts: int, max_new_tokens: int, pad: int) -> Beam:
        """A beam of empty drafts behind prompts' last tokens, (batch, context)."""
        batch, context = contexts.shape
        room = contexts.new_full((batch, max_new_tokens), pad)
        sequences = torch.cat([contexts, room], dim=1)[:, None].repeat(1, drafts, 1)
        nothing = torch.full((batch, drafts), -torch.inf, dtype=torch.float64, device=contexts.device)
        # The drafts begin alike: only the first has successors, or all would take the same token.
        scores = nothing.clone()
        scores[:, 0] = 0
        return cls(sequences, scores, sequences.clone(), nothing, torch.ones_like(sequences[..., 0]), context, context)

    @property
    def newest(self) -> Tensor:
        """The last token of each running draft, (batch, k)."""
        return self.sequences[:, :, self.written - 1]

    def advance(self, tokens: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Go on with the best k pairs of a draft and a token; pairs that end a draft and are among the best 2 k finish.

        Args:
            tokens: Candidates, the same for all drafts of a prompt, (batch, m).
            scores: Log-score of each behind each draft, (batch, k, m).
            ends: Tokens that end a draft.
        """
        drafts = scores.shape[1]
        candidates = (self.scores[:, :, None] + scores).flatten(1)
        ending = torch.isin(tokens, ends).repeat(1, drafts)
        if len(ends):
            _, best = _best(candidates, 2 * drafts)
            self._finish(self._grown(tokens, best), candidates.masked_fill(~ending, -torch.inf).gather(1, best))
        self.scores, best = _best(candidates.masked_fill(ending, -torch.inf), drafts)
        self.sequences = self._grown(tokens, best)
        self.written += 1

    def _finish(self, sequences: Tensor, scores: Tensor) -> None:
        """Keep the best k of the finished drafts and of new ones, which score minus infinity where they have not ended."""
        pool = torch.cat([self.finished, sequences], dim=1)
        new = self.lengths.new_full(scores.shape, self.written + 1 - self.context)
        lengths = torch.cat([self.lengths, new], dim=1)
        self.finished_scores, best = _best(torch.cat([self.finished_scores, scores], dim=1), self.scores.shape[1])
        self.finished, self.lengths = _rows(pool, best), lengths.gather(1, best)

    def _grown(self, tokens: Tensor, pairs: Tensor) -> Tensor:
        """Drafts with a token behind them; pairs count through the tokens (batch, m) of one draft after the other."""
        m = tokens.shape[1]
        sequences = _rows(self.sequences, pairs // m)
        sequences[:, :, self.written] = tokens.gather(1, pairs % m).to(sequences)
        return sequences


def superpose(embeddings: Tensor, scores: Tensor) -> Tensor:
    """Mean of the drafts' embeddings (batch, k, d), weighted by their probabilities softmax(scores), (batch, d).

    Example:
        >>> superpose(torch.tensor([[[0.0], [8.0]]]), torch.tensor([[0.5, 0.75]]).log())
        tensor([[4.8000]])
    """
    precise = torch.promote_types(embeddings.dtype, torch.float32)
    weights = scores.softmax(-1).to(precise)
    return (weights[:, None] @ embeddings.to(precise))[:, 0].to(embeddings.dtype)


def _read(target: Target, cache: TreeCache, embedding: Tensor) -> Tensor:
    """Let the model read one embedding a row (batch, d) for good; the logits behind it (batch, vocab)."""
    batch = len(embedding)
    logits, _ = target.read_on(embedding[:, None], cache)
    cache.commit(torch.zeros(batch, 1, dtype=torch.long, device=target.device), [1] * batch)
    return logits[:, -1]


def _result(beam: Beam, input_ids: Tensor, target_calls: int) -> Drafts:
    """The best k of running and finished drafts by perplexity."""
    drafts, total = beam.scores.shape[1], beam.written - beam.context
    scores = torch.cat([beam.scores, beam.finished_scores], dim=1)
    lengths = torch.cat([torch.full_like(beam.lengths, total), beam.lengths], dim=1)
    _, best = _best(scores / lengths, drafts)
    scores, lengths, finished = scores.gather(1, best), lengths.gather(1, best), best >= drafts
    new = _rows(torch.cat([beam.sequences, beam.finished], dim=1), best)[..., beam.context :]
    scores = scores.where(scores > _RULED_OUT / 2, -torch.inf)
    return Drafts(
        sequences=torch.cat([input_ids[:, None].expand(-1, drafts, -1), new.to(input_ids)], dim=-1),
        new_tokens=[
            [draft[:length] for draft, length in zip(*row, strict=True)]
            for row in zip(new.tolist(), lengths.tolist(), strict=True)
        ],
        finished=finished,
        scores=scores,
        perplexities=(-scores / lengths).exp(),
        target_calls=target_calls,
    )


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` of scores (batch, n) and their places; of equal ones the first, which the model prefers."""
    scores, places = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :count], places[:, :count]


def _rows(sequences: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch, n) of sequences (batch, k, length)."""
    return sequences.gather(1, index[..., None].expand(-1, -1, sequences.shape[-1]))
