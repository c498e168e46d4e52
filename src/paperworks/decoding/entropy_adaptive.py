"""EntropyAdaptiveDecoding: a small model writes, and a large one where the next token is uncertain (arXiv 2502.06833)."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from paperworks.decoding.cache import TreeCache
from paperworks.decoding.engine import as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.options import as_criteria
from paperworks.decoding.sampling import Sampling, check_logits, draw
from paperworks.decoding.target import Target

Model = Literal["small", "large"]


def entropy(logits: Tensor) -> Tensor:
    """Entropy in bits of the law that `logits` (..., vocab) give before any temperature or truncation: (...).

    Example:
        >>> entropy(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])).tolist()
        [2.0, 0.0]
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.special.entr(precise.softmax(-1)).sum(-1) / math.log(2)


def relative_cost(large_fraction: float, small_parameters: float, large_parameters: float) -> float:
    """The paper's cost of a text against the large model alone: f + (1 - f) N_small / N_large.

    Args:
        large_fraction: Share f of the tokens that the large model wrote, within [0, 1].
        small_parameters: Parameters of the small model.
        large_parameters: Those of the large one.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> f"{1 - relative_cost(0.43, 3e9, 11e9):.1%} saved"
        '41.5% saved'
    """
    if not 0 <= large_fraction <= 1 or min(small_parameters, large_parameters) <= 0:
        raise ValueError(
            f"large_fraction must be within [0, 1] and parameters positive, got {large_fraction}, {small_parameters} and "
            f"{large_parameters}"
        )
    return large_fraction + (1 - large_fraction) * small_parameters / large_parameters


class Switch(Protocol):
    """Decides who writes.

    Attributes:
        active: The model whose law comes next.
        writer: The model that writes the token whose law was judged last.
        rolling: What that law was judged by.
    """

    active: Model
    writer: Model
    rolling: float

    def step(self, entropy: float) -> Model:
        """Take in the entropy in bits of the law of one token; the model for the next."""
        ...


@dataclass
class EntropySwitch:
    """The paper's rule: the large model where the mean entropy of the last laws exceeds a threshold, else the small.

    The law of one token decides who makes the next. A model keeps its turn for `min_stay` tokens at least.

    Args:
        threshold: tau in bits; the paper sweeps it, `EntropyAdaptiveDecoding.calibrate` finds it for a wanted share.
        window: Laws w that are averaged, or those there are while there are fewer. 5 in the paper.
        min_stay: Tokens d_min that a model makes before the other may have its turn; 0 or 1 for no bound.
        start: Which model begins.
        full_window: Keep the first model until there are `window` laws.
        clear_window: Forget, at a switch, the entropies of the model that was left.
        preempt: A variant of ours: the token that sets off the large model is made by the large model too, at the
            price of another law of that token. Otherwise the small model makes it.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> switch = EntropySwitch(threshold=2.0, window=2, min_stay=1)
        >>> [switch.step(bits) for bits in (1.0, 3.0, 3.0, 1.0, 0.0)]
        ['small', 'small', 'large', 'small', 'small']
    """

    threshold: float
    window: int = 5
    min_stay: int = 10
    start: Model = "small"
    full_window: bool = False
    clear_window: bool = False
    preempt: bool = False
    active: Model = field(init=False, repr=False)
    writer: Model = field(init=False, repr=False)
    rolling: float = field(default=math.nan, init=False, repr=False)

    def __post_init__(self) -> None:
        if math.isnan(self.threshold):
            raise ValueError("threshold must be a number of bits, or infinite to leave one model alone, got nan")
        if self.window < 1 or self.min_stay < 0:
            raise ValueError(
                f"window must be at least 1 and min_stay at least 0 tokens, got {self.window} and {self.min_stay}"
            )
        if self.start not in ("small", "large"):
            raise ValueError(f"start must be 'small' or 'large', got {self.start!r}")
        self.active = self.writer = self.start
        self._made = 0  # tokens that the active model has made since the last switch
        self._entropies: deque[float] = deque(maxlen=self.window)

    def step(self, entropy: float) -> Model:
        """Take in the entropy in bits of the law of one token; the model for the next."""
        self._entropies.append(entropy)
        self.rolling = sum(self._entropies) / len(self._entropies)
        wanted: Model = "large" if self.rolling > self.threshold else "small"
        early = self.preempt and wanted == "large"
        made = self._made + (not early)
        if wanted == self.active or made < self.min_stay or (self.full_window and len(self._entropies) < self.window):
            self.writer = self.active
            self._made += 1
            return self.active
        self.writer = wanted if early else self.active
        self.active, self._made = wanted, int(early)
        if self.clear_window:
            self._entropies.clear()
        return self.active


@dataclass
class Usage:
    """What one of the two models did for a text.

    Attributes:
        parameters: Its size.
        passes: How often it was called, for the prompt too.
        tokens: Tokens that it read, the prompt and what it caught up with included.
    """

    parameters: int
    passes: int = 0
    tokens: int = 0


@dataclass
class SwitchedGeneration:
    """A text of two writers.

    Attributes:
        sequences: Prompt and new tokens, (1, length).
        new_tokens: The new tokens, end-of-sequence token included where one came: a list of one list.
        models: Who wrote each new token.
        entropies: Entropy in bits by which each was judged.
        rolling: Mean of the entropies in the window, at each.
        small: What the small model did.
        large: What the large model did.
    """

    sequences: Tensor
    new_tokens: list[list[int]]
    models: list[Model]
    entropies: list[float]
    rolling: list[float]
    small: Usage
    large: Usage

    @property
    def large_fraction(self) -> float:
        """Share of the new tokens that the large model wrote."""
        return self.models.count("large") / len(self.models)

    @property
    def switches(self) -> int:
        """How often the text passes from one model to the other."""
        return sum(one != other for one, other in zip(self.models, self.models[1:], strict=False))

    @property
    def cost(self) -> float:
        """The paper's cost against the large model alone, which counts written tokens only."""
        return relative_cost(self.large_fraction, self.small.parameters, self.large.parameters)

    @property
    def real_cost(self) -> float:
        """Parameters times tokens read, prompt and catching up included, against the large model alone."""
        read = self.small.tokens * self.small.parameters + self.large.tokens * self.large.parameters
        return read / ((self.sequences.shape[1] - 1) * self.large.parameters)


class EntropyAdaptiveDecoding:
    """Two models of one tokenizer write one text, in turns that the next token's entropy decides (arXiv 2502.06833).

    The text is neither model's own: it trades closeness to the large model for its cost. Each model has a cache of its
    own, so that both take memory. The one that is not at work reads nothing; when its turn comes it reads what it missed
    in one pass, the prompt too if it had no turn before.

    Args:
        small: A transformers causal LM.
        large: Another that knows the same tokens.
        switch: Decides who writes; `EntropySwitch` is the paper's rule. Each text begins with a copy of it.
        entropy_of: Whose law is judged: that of the "active" model, or always the "small" one's, which then reads
            every token.
        tokenizers: Those of both models, so that they can be compared, and rows of the heads that stand for no token
            (padding) are left out. Without them only the heads' sizes can be.

    Raises:
        TypeError: not a causal language model.
        ValueError: the models' tokens differ, or `entropy_of` is neither.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=50)
        >>> small = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> large = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()
        >>> decoding = EntropyAdaptiveDecoding(small, large, EntropySwitch(threshold=0.0, min_stay=4))
        >>> result = decoding.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, eos_token_id=[])
        >>> result.models.index("large"), result.large_fraction, result.large.tokens
        (4, 0.5, 10)
    """

    def __init__(
        self,
        small: nn.Module,
        large: nn.Module,
        switch: Switch,
        *,
        entropy_of: Literal["active", "small"] = "active",
        tokenizers: tuple[Any, Any] | None = None,
    ) -> None:
        if entropy_of not in ("active", "small"):
            raise ValueError(f"entropy_of must be 'active' or 'small', got {entropy_of!r}")
        self.small, self.large, self.switch, self.entropy_of = small, large, switch, entropy_of
        self.vocabulary = _shared_vocabulary(Target(small).vocab_size, Target(large).vocab_size, tokenizers)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        stopping_criteria: Any = None,
        generator: torch.Generator | None = None,
    ) -> SwitchedGeneration:
        """Continue one prompt.

        Args:
            input_ids: The prompt, (1, length) or (length,).
            max_new_tokens: Tokens to add at most.
            temperature: 0 for greedy decoding; it has no part in the entropy, and neither have `top_k` and `top_p`.
            top_k: Sample among the k most likely tokens.
            top_p: Sample among the most likely tokens that make up this probability.
            eos_token_id: Token or tokens that end the text, [] for none; if None, those of both models' generation
                configs.
            stopping_criteria: One of transformers' or a list of them, such as `StopStringCriteria`; sees the joint text, and
                the logits of its last token.
            generator: Source of randomness, on the device of `input_ids`.

        Raises:
            ValueError: several prompts, an empty one, or one longer than a model's context; NaN logits; a sampling value
                out of range.
        """
        prompts = split_prompts(as_prompts(input_ids), None)
        if len(prompts) > 1:
            raise ValueError(f"got {len(prompts)} prompts, but each text has its own turns: continue them one by one")
        readers = {"small": _Reader(self.small, self.vocabulary), "large": _Reader(self.large, self.vocabulary)}
        ends: set[int] = set()
        for reader in readers.values():
            check_lengths(reader.target, prompts, max_new_tokens)
            ends |= end_tokens(reader.target.model, eos_token_id)
        sampling, switch = Sampling(temperature, top_k, top_p), copy.deepcopy(self.switch)
        criteria = as_criteria(stopping_criteria)
        length = len(prompts[0])
        text = torch.cat([prompts[0], prompts[0].new_zeros(max_new_tokens)])
        models: list[Model] = []
        entropies: list[float] = []
        rolling: list[float] = []
        while len(models) < max_new_tokens:
            past, active = text[: length + len(models)], switch.active
            logits = readers[active].next_logits(past)
            judged = readers["small"].next_logits(past) if self.entropy_of == "small" != active else logits
            entropies.append(float(entropy(judged)))
            switch.step(entropies[-1])
            if switch.writer != active:
                logits = readers[switch.writer].next_logits(past)
            logits = logits.to(text.device)
            token = logits.argmax(-1) if sampling.greedy else draw(sampling.probabilities(logits), generator)
            text[len(past)] = token
            models.append(switch.writer)
            rolling.append(switch.rolling)
            sequence = text[None, : length + len(models)]
            if int(token) in ends or (criteria and bool(criteria(sequence, (logits,)).any())):
                break
        usages = [reader.usage for reader in readers.values()]
        return SwitchedGeneration(sequence, [sequence[0, length:].tolist()], models, entropies, rolling, *usages)

    def calibrate(self, prompts: Sequence[Tensor], target_fraction: float, *, rounds: int = 2, **options: Any) -> float:
        """The threshold in bits at which the large model writes about a wanted share of the tokens.

        Writes texts with the rule, reads them with both models, and replays the rule on their entropies for many
        thresholds. Another threshold makes other texts, so that this is done again with the threshold found. The first
        texts are by the model that starts.

        Args:
            prompts: Prompts like those to come, each (1, length) or (length,).
            target_fraction: Share wanted, within [0, 1].
            rounds: How often texts are written.
            **options: Those of `generate`.

        Raises:
            TypeError: the switch is no `EntropySwitch`.
            ValueError: no prompts, or a share or number of rounds out of range.
        """
        if not isinstance(self.switch, EntropySwitch):
            raise TypeError(f"only an EntropySwitch has a threshold to find, got {type(self.switch).__name__}")
        if not len(prompts) or not 0 <= target_fraction <= 1 or rounds < 1:
            raise ValueError(
                f"calibrate takes at least one prompt and one round and a share within [0, 1], got {len(prompts)}, "
                f"{rounds} and {target_fraction}"
            )
        threshold = math.inf if self.switch.start == "small" else -1.0
        writing = copy.copy(self)
        for _ in range(rounds):
            writing.switch = replace(self.switch, threshold=threshold)
            laws = [self._entropies(writing.generate(prompt, **options)) for prompt in prompts]
            width = min(self.switch.window, *(len(law) for law in laws))
            means = torch.cat([law.unfold(0, width, 1).mean(-1).flatten() for law in laws])
            candidates = [-1.0, *means.quantile(torch.linspace(0, 1, 129, dtype=means.dtype)).tolist(), math.inf]
            # The share need not fall with the threshold, since another model's entropies take over: look at all.
            shares = [
                fmean(writer == "large" for law in laws for writer in self._replay(law, tau)) for tau in candidates
            ]
            threshold = min(zip(candidates, shares, strict=True), key=lambda pair: abs(pair[1] - target_fraction))[0]
        return threshold

    @torch.no_grad()
    def _entropies(self, text: SwitchedGeneration) -> Tensor:
        """Entropies in bits of both models' laws of each new token, (new_tokens, 2)."""
        both = []
        for model in (self.small, self.large):
            ids = text.sequences.to(Target(model).device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(text.models) + 1).logits[0, :-1]
            both.append(entropy(logits[:, : self.vocabulary]).double().cpu())
        return torch.stack(both, dim=1)

    def _replay(self, entropies: Tensor, threshold: float) -> list[Model]:
        """Who would write each new token of that text."""
        assert isinstance(self.switch, EntropySwitch)
        switch = replace(self.switch, threshold=threshold)
        writers: list[Model] = []
        for small, large in entropies.tolist():
            switch.step(small if self.entropy_of == "small" or switch.active == "small" else large)
            writers.append(switch.writer)
        return writers


class _Reader:
    """One of the two models with its cache, which lags behind the text while the other model writes."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self.target = Target(model)
        self.cache = TreeCache(self.target.config, 1)
        self.vocabulary = vocabulary
        self.usage = Usage(sum(parameter.numel() for parameter in model.parameters()))

    def next_logits(self, text: Tensor) -> Tensor:
        """Logits (1, vocab) behind `text` (length,), of which only what the cache lacks is read."""
        target, known = self.target, self.cache.lengths[0]
        missed = text[None, known:].to(target.device)
        line = torch.arange(missed.shape[1], device=target.device)[None]
        # Of the tokens that were missed only the last one's law is wanted.
        logits = target.read_on(missed, self.cache, keep=1)[0][:, -1, : self.vocabulary]
        self.cache.commit(line, [missed.shape[1]])
        check_logits(logits)
        self.usage.passes += 1
        self.usage.tokens += missed.shape[1]
        return logits


def _shared_vocabulary(small: int, large: int, tokenizers: tuple[Any, Any] | None) -> int:
    """How many tokens both models know by the same ids."""
    if tokenizers is None:
        if small != large:
            raise ValueError(
                f"the small model's head scores {small} tokens and the large one's {large}: take two models of one "
                "tokenizer; if theirs is the same and only padded, give both as tokenizers"
            )
        return small
    one, other = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if one != other:
        token = min(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
        raise ValueError(
            f"the models' tokenizers differ, such as in {token!r}, whose id is {one.get(token)} for the small model and "
            f"{other.get(token)} for the large: take two models of one tokenizer"
        )
    tokens = max(one.values()) + 1
    if tokens > min(small, large):
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the heads score {small} and {large}: give the models' own tokenizers"
        )
    return int(tokens)
