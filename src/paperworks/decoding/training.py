"""Training every drafter alike: text that the target writes, its hidden states kept once, one training loop."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.costs import Choice, choose_tree
from paperworks.decoding.drafter import Drafter
from paperworks.decoding.engine import generate, stream
from paperworks.decoding.progress import Progress, telling
from paperworks.decoding.sampling import Sampling
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TreeShape
from paperworks.nn import multiplies_bfloat16

# Of so many sequences accuracy is measured where a tree is to be chosen, and of the most frequent tokens so many are tried.
_JUDGED = 64
_VOCABULARIES = (16_384, 8192, 4096, 2048)


class Prediction(NamedTuple):
    """What one depth of a drafter says about all usable positions of a batch.

    Attributes:
        logits: Scores over the drafter's vocabulary, (positions, vocab).
        labels: The tokens that came, (positions,).
        positions: (row, index) of the target's state that predicts the same tokens, (positions, 2).
        state: The drafter's estimate of that state, (positions, d).
    """

    logits: Tensor
    labels: Tensor
    positions: Tensor
    state: Tensor


class DraftHeads(Protocol):
    """A drafter of fixed depth which can say what it would draft at every position at once."""

    vocabulary: Tensor | None
    tree: TreeShape

    def predictions(self, target: Target, tokens: Tensor, hidden: Tensor, mask: Tensor) -> Iterator[Prediction]:
        """Predictions of each depth in turn."""
        ...


@dataclass(frozen=True)
class DraftingData:
    """Sequences with the target's hidden states, computed once for all drafters.

    Attributes:
        tokens: (sequences, length), int64, padded on the right.
        hidden: (sequences, length, d).
        mask: Whether a token may serve as a label: part of an answer and not padding.
    """

    tokens: Tensor
    hidden: Tensor
    mask: Tensor

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    def split(self, held_out: int) -> tuple[DraftingData, DraftingData]:
        """All but the last `held_out` sequences, and those."""
        if not 0 < held_out < len(self):
            raise ValueError(f"held_out must be between 1 and {len(self) - 1}, got {held_out}")
        parts = [(tensor[:-held_out], tensor[-held_out:]) for tensor in (self.tokens, self.hidden, self.mask)]
        first, last = zip(*parts, strict=True)
        return DraftingData(*first), DraftingData(*last)

    @classmethod
    def join(cls, parts: Sequence[DraftingData]) -> DraftingData:
        """The sequences of all parts, padded to the longest."""
        length = max(part.tokens.shape[1] for part in parts)

        def padded(tensor: Tensor) -> Tensor:
            rest = [0, 0] * (tensor.ndim - 2) + [0, length - tensor.shape[1]]
            return F.pad(tensor, rest)

        return cls(
            *(torch.cat([padded(getattr(part, name)) for part in parts]) for name in ("tokens", "hidden", "mask"))
        )

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file."""
        save_file({"tokens": self.tokens, "hidden": self.hidden.contiguous(), "mask": self.mask}, path)

    @classmethod
    def load(cls, path: str | Path) -> DraftingData:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    def frequent_tokens(self, count: int) -> Tensor:
        """The `count` tokens most often met as labels, ascending; rarer ids fill up where fewer occur."""
        vocabulary = int(self.tokens.max()) + 1
        counts = torch.bincount(self.tokens[self.mask], minlength=max(vocabulary, count))
        return counts.argsort(descending=True, stable=True)[:count].sort().values


def self_written(
    model: Any,
    tokenizer: Any,
    *,
    tokens: int,
    answer_tokens: int = 128,
    question_tokens: int = 64,
    temperature: float = 0.7,
    question_temperature: float = 0.9,
    question_top_k: int = 50,
    examples: Sequence[str] = (),
    shown: int = 3,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    progress: Progress | bool | None = True,
) -> list[tuple[list[int], list[int]]]:
    """Text that the target writes with no corpus: questions it samples, then its own answers.

    A chat model is given its template up to where the user would speak, and samples a question; the answer follows
    through the template at `temperature`. With `examples` it samples the question behind a few of them, as if a user had
    asked those before, and the answer does not see them: by itself a small model asks much the same few things. A model
    without a chat template continues from its beginning-of-sequence token, behind examples one to a line.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        tokens: Answer tokens wanted in all.
        answer_tokens: At most so many an answer.
        question_tokens: At most so many a question.
        temperature: Of the answers. Greedy answers of a small model soon run in circles, of which a drafter learns
            little.
        question_temperature: Of the questions. Below 1 a small model asks what people ask; behind examples 1 will do.
        question_top_k: Questions are sampled among so many tokens.
        examples: Questions that show what users ask; they teach nothing themselves.
        shown: So many of them, drawn at random, stand before each new question.
        batch_size: Questions at once.
        generator: Randomness.
        progress: Called with the number of new answer tokens; True tells how far it is on the error stream, False nobody.

    Returns:
        (context, answer) pairs of token ids.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    before, between, after = _user_turn(tokenizer)
    asked_before = [[*tokenizer.encode(example, add_special_tokens=False), *between] for example in examples]
    stop = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    written: list[tuple[list[int], list[int]]] = []
    total = 0
    with telling(progress, tokens, "the model writes its training text") as tell:
        while total < tokens:
            chance = torch.rand(batch_size, len(examples), device=model.device, generator=generator)
            drawn = chance.argsort(-1)[:, :shown]
            ids, mask = _padded([sum((asked_before[i] for i in row), before) for row in drawn.tolist()], model.device)
            asked = generate(
                model,
                ids,
                attention_mask=mask,
                max_new_tokens=question_tokens,
                temperature=question_temperature,
                top_k=question_top_k,
                eos_token_id=stop,
                generator=generator,
            ).new_tokens
            contexts = [before + [token for token in question if token not in stop] + after for question in asked]
            ids, mask = _padded(contexts, model.device)
            answers: list[list[int]] = [[] for _ in contexts]
            for step in stream(
                model,
                ids,
                attention_mask=mask,
                max_new_tokens=answer_tokens,
                sampling=Sampling(temperature),
                eos_token_id=stop,
                generator=generator,
            ):
                for answer, new in zip(answers, step, strict=True):
                    answer += new
                tell(sum(map(len, step)))
            written += zip(contexts, answers, strict=True)
            total += sum(map(len, answers))
    return written


def _user_turn(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Token ids of the chat template before what a user says first, before what they say next, and behind it."""
    if not getattr(tokenizer, "chat_template", None):
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [first if first is not None else 0], tokenizer.encode("\n", add_special_tokens=False), []
    marker = "\N{INTERROBANG}"
    # Many templates refuse two turns of a user in a row.
    turns = [{"role": role, "content": marker} for role in ("user", "assistant", "user")]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    before, _, between, after = (tokenizer.encode(part, add_special_tokens=False) for part in text.split(marker))
    return before, between, after


def _padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(sequence, device=device) for sequence in sequences]
    mask = [torch.ones_like(row) for row in rows]
    return (
        nn.utils.rnn.pad_sequence(rows, batch_first=True),
        nn.utils.rnn.pad_sequence(mask, batch_first=True),
    )


@torch.no_grad()
def collect(
    model: nn.Module,
    written: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    progress: Progress | bool | None = True,
) -> DraftingData:
    """Run the target once over (context, answer) pairs and keep its hidden states.

    Args:
        model: The target.
        written: Pairs of token ids; only answers become labels. Any corpus will do: give its texts as answers.
        batch_size: Sequences at once.
        progress: Called with the number of sequences done; True and False as for `self_written`.
    """
    if not any(len(answer) for _, answer in written):
        raise ValueError("there is no answer text to train on: give at least one (context, answer) pair with an answer")
    target = Target(model)
    sequences = [[*context, *answer] for context, answer in written]
    length = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    hidden = torch.zeros(len(sequences), length, target.hidden_size, dtype=target.dtype)
    for row, ((context, _), sequence) in enumerate(zip(written, sequences, strict=True)):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, len(context) : len(sequence)] = True
    # Sequences of like length together, so that little padding is computed.
    order = sorted(range(len(sequences)), key=lambda row: len(sequences[row]))
    batch_size = 1 if target.ordered(length) else batch_size
    with telling(progress, len(order), "the model reads its training text") as tell:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            prompts = [torch.tensor(sequences[row]) for row in rows]
            states = target.prefill(prompts, TreeCache(target.config, len(rows)))[1]
            hidden[rows, : states.shape[1]] = states.cpu()
            tell(len(rows))
    return DraftingData(tokens, hidden, mask)


def distillation_loss(
    predictions: Iterable[Prediction],
    target: Target,
    hidden: Tensor,
    vocabulary: Tensor | None,
    *,
    label_weight: float,
    teacher_weight: float,
    state_weight: float,
) -> Tensor:
    """Sum over depths of label cross-entropy, cross-entropy with the target's law, and smooth L1 between states.

    With a reduced `vocabulary` the target's law is renormalised over it, and labels outside it teach nothing.
    """
    predictions = [prediction for prediction in predictions if len(prediction.labels)]
    total = hidden.new_zeros((), dtype=torch.float32)
    if not predictions:
        return total
    # Depths ask for the same states, and nobody for those of the questions.
    asked, which = torch.cat([prediction.positions for prediction in predictions]).unique(dim=0, return_inverse=True)
    states = hidden[asked[:, 0], asked[:, 1]]
    if teacher_weight:
        with torch.no_grad():
            laws = target.logits(states, vocabulary).float().softmax(-1)
    if vocabulary is not None and label_weight:
        place = torch.full((target.vocab_size,), -100, device=hidden.device)
        place[vocabulary] = torch.arange(len(vocabulary), device=hidden.device)
    of_depth = which.split([len(prediction.labels) for prediction in predictions])
    for (logits, labels, _, state), seen in zip(predictions, of_depth, strict=True):
        if label_weight:
            wanted = labels if vocabulary is None else place[labels]
            if bool((wanted >= 0).any()):
                total = total + label_weight * F.cross_entropy(logits.float(), wanted, ignore_index=-100)
        if teacher_weight:
            total = total + teacher_weight * soft_cross_entropy(logits, laws, seen)
        if state_weight:
            total = total + state_weight * F.smooth_l1_loss(state.float(), states[seen].float())
    return total


def soft_cross_entropy(logits: Tensor, laws: Tensor, which: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` (n, vocab) with the laws `laws[which]`; `laws` is (m, vocab), `which` is (n,).

    Example:
        >>> logits, laws = torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.5, 0.5]])
        >>> round(float(soft_cross_entropy(logits, laws, torch.tensor([0, 0]))), 4)
        0.6931
    """
    mean: Tensor = _SoftCrossEntropy.apply(logits, laws, which)  # type: ignore[no-untyped-call]
    return mean


class _SoftCrossEntropy(torch.autograd.Function):
    """Value and gradient in one go over blocks that a processor's cache holds.

    Autograd would write and read the logits in float32 six times over, which took longer than the products around them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, laws: Tensor, which: Tensor) -> Tensor:
        block = 32 if logits.device.type == "cpu" else 4096
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        for scores, law, slope in zip(logits.split(block), which.split(block), gradient.split(block), strict=True):
            log_law = scores.float().log_softmax(-1)
            wanted = laws[law]
            total -= (wanted * log_law).sum()
            slope.copy_(log_law.exp_().sub_(wanted))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream / len(gradient)).to(gradient.dtype), None, None


def train_drafter(
    drafter: Drafter,
    model: nn.Module,
    data: DraftingData,
    *,
    epochs: float = 3.0,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    final_fraction: float = 0.1,
    generator: torch.Generator | None = None,
    progress: Progress | bool | None = True,
) -> list[float]:
    """Train `drafter` in place against the frozen `model`: AdamW, warm-up, then cosine decay.

    Weights are kept in float32 while training, with bfloat16 products where the hardware has them, and return to their
    dtype afterwards.

    Args:
        drafter: Any drafter with a `loss`.
        model: The target.
        data: From `collect`.
        epochs: Passes over the data; may be fractional.
        batch_size: Sequences a step.
        learning_rate: Peak.
        warmup: Fraction of the steps in which the rate rises.
        weight_decay: AdamW's.
        final_fraction: Learning rate at the end, as a fraction of the peak.
        generator: Order of the sequences.
        progress: Called with 1 after each step; True and False as for `self_written`.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a value out of range, or a loss that is no longer finite.
    """
    if epochs <= 0 or batch_size < 1 or learning_rate <= 0:
        raise ValueError("epochs and learning_rate must be positive and batch_size at least 1")
    target = Target(model)
    # The teacher's law is scored anew from its states.
    target.check_states()
    dtype = next(drafter.parameters()).dtype
    mixed = dtype != torch.float64 and multiplies_bfloat16(target.device)
    steps = max(1, round(epochs * len(data) / batch_size))
    rising = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        cosine = (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2
        return final_fraction + (1 - final_fraction) * cosine

    losses: list[float] = []
    batches = _batches(data, batch_size, generator)
    drafter.belongs_to(model)
    try:
        drafter.float().train()
        optimiser = torch.optim.AdamW(
            drafter.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        with telling(progress, steps, f"training {type(drafter).__name__}") as tell:
            for _ in range(steps):
                rows = next(batches)
                labelled = data.mask[rows].any(0).nonzero()
                longest = int(labelled.max()) + 1 if len(labelled) else 1
                tokens, hidden, mask = (
                    part[rows, :longest].to(target.device) for part in (data.tokens, data.hidden, data.mask)
                )
                with torch.autocast(target.device.type, torch.bfloat16, enabled=mixed):
                    loss = drafter.loss(target, tokens, hidden.float(), mask)
                if not bool(loss.isfinite()):
                    raise ValueError(
                        f"the training loss became {loss.item()} at step {len(losses)}: lower learning_rate"
                    )
                optimiser.zero_grad(set_to_none=True)
                # Texts shorter than the drafter looks ahead teach nothing.
                if loss.requires_grad:
                    loss.backward()
                nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                tell(1)
    finally:
        # The draft model of RecursiveSpeculation may be somebody's own, and training may be interrupted.
        for parameter in drafter.parameters():
            parameter.grad = None
        drafter.to(dtype).eval()
    return losses


def _batches(data: DraftingData, size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(len(data), generator=generator)
        yield from order.split(size)


@torch.inference_mode()
def rank_accuracy(
    drafter: DraftHeads,
    model: nn.Module,
    data: DraftingData,
    *,
    ranks: int = 10,
    batch_size: int = 8,
    greedy: bool = False,
) -> Tensor:
    """How often the token of each rank is the right one, with the true tokens before it: (depth, ranks).

    There are no more ranks than the drafter scores tokens.

    Right is the token that came; with `greedy` it is the target's most likely one, where all tokens before it on the
    path were so too: what greedy decoding accepts, also on text that was sampled.
    """
    target = Target(model)
    hits: list[Tensor] = []
    seen: list[int] = []
    for first in range(0, len(data), batch_size):
        rows = slice(first, first + batch_size)
        tokens, hidden, mask = (part[rows].to(target.device) for part in (data.tokens, data.hidden, data.mask))
        on_path = torch.ones_like(mask)
        if greedy:
            choice = target.logits(hidden).argmax(-1)
            likeliest = F.pad(tokens[:, 1:] == choice[:, :-1], (1, 0))
        for depth, prediction in enumerate(drafter.predictions(target, tokens, hidden, mask)):
            row, index = prediction.positions.T
            counted = on_path[row, index]
            best = prediction.logits[counted].topk(min(ranks, prediction.logits.shape[1])).indices
            best = best if drafter.vocabulary is None else drafter.vocabulary[best]
            wanted = (choice[row, index] if greedy else prediction.labels)[counted]
            if depth == len(hits):
                hits.append(torch.zeros(best.shape[1], dtype=torch.long))
                seen.append(0)
            hits[depth] += (best == wanted[:, None]).sum(0).cpu()
            seen[depth] += len(best)
            if greedy:
                on_path = likeliest & F.pad(on_path[:, :-1], (1, 0))
    return torch.stack([hit / max(1, count) for hit, count in zip(hits, seen, strict=True)]).double()


def fit_tree(
    drafter: DraftHeads,
    model: nn.Module,
    held_out: DraftingData,
    *,
    nodes: int | None = None,
    costs: Callable[[int], float] | None = None,
    ranks: int = 10,
    greedy: bool = True,
    progress: Progress | bool | None = True,
) -> Tensor:
    """Give `drafter` the tree that suits it; returns the rank accuracy.

    With a number of nodes it is that of so many which should be accepted furthest. Without one it is that of most tokens a
    second on this machine: what passes of the model and drafts cost is measured (see `pass_costs`; once, in some
    seconds), and a tree of no nodes, which is plain decoding, is chosen where no drafting pays. A drafter that scores all
    tokens with the model's own head is then given the most frequent ones alone, where that is faster.

    Args:
        drafter: One with trees of fixed shape.
        model: The target, as it will be used: on a CPU after `paperworks.nn.pack_linears(model)`.
        held_out: From `collect`, best of text that was not trained on. Without `nodes` its last 64 sequences are judged.
        nodes: Drafted tokens a call.
        costs: Cost of a pass over n tokens in passes over one, instead of this machine's, such as `PassCosts`.
        ranks: Children of a node at most.
        greedy: Fit to what greedy decoding accepts; else to the text as it was sampled.
        progress: Whether to say on the error stream what was chosen.

    Raises:
        TypeError: a drafter whose trees have no fixed shape.
        ValueError: nodes below 1.
    """
    if not isinstance(getattr(drafter, "tree", None), TreeShape):
        raise TypeError(
            f"the trees of a {type(drafter).__name__} have no fixed shape that could be fitted: set its own options, such as "
            "nodes and depth of FSPAD"
        )
    if nodes is not None:
        accuracy = rank_accuracy(drafter, model, held_out, ranks=ranks, greedy=greedy)
        drafter.tree = TreeShape.best(accuracy, nodes)
        return accuracy
    judged = held_out.split(_JUDGED)[1] if len(held_out) > _JUDGED else held_out
    tried: list[tuple[Choice, Tensor, Tensor | None]] = []
    with telling(progress, len(vocabularies := _vocabularies(drafter, judged)), "fitting a tree") as tell:
        for vocabulary in vocabularies:
            _draft_only(drafter, model, vocabulary)
            accuracy = rank_accuracy(drafter, model, judged, ranks=ranks, greedy=greedy)
            tried.append((choose_tree(drafter, model, accuracy, costs), accuracy, vocabulary))  # type: ignore[arg-type]
            tell(1)
    choice, accuracy, vocabulary = max(tried, key=lambda one: one[0].gain)
    _draft_only(drafter, model, vocabulary)
    drafter.tree = choice.tree
    if progress is True:
        print(f"{type(drafter).__name__}: {choice}", file=sys.stderr)
    return accuracy


def _vocabularies(drafter: DraftHeads, data: DraftingData) -> list[Tensor | None]:
    """Which tokens a drafter may draft: those it has, or where it has all, and nothing of its own to score them, fewer."""
    known = getattr(drafter, "scored", 0)
    if drafter.vocabulary is not None or not getattr(drafter, "options", {}).get("tie_lm_head"):
        return [drafter.vocabulary]
    return [None, *(data.frequent_tokens(size) for size in _VOCABULARIES if size < known)]


def _draft_only(drafter: Any, model: nn.Module, vocabulary: Tensor | None) -> None:
    """Let a drafter that scores with the model's head draft these tokens alone, or all."""
    if vocabulary is not drafter.vocabulary:
        target = Target(model)
        drafter.vocabulary = None if vocabulary is None else vocabulary.to(target.device)
        drafter.scored = target.vocab_size if vocabulary is None else len(vocabulary)
