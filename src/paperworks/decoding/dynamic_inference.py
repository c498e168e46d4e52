"""DynamicInference: leave a model at an intermediate layer, or stop a completion that will not be accepted.

The Stop&Exit Controller of arXiv 2401.09964.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self, TypedDict, Unpack

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paperworks.decoding.engine import Generation, Statistics, as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.identity import difference, identity
from paperworks.decoding.layer_exit import Action, ExitCache, Policy, layer_outputs, layers_of, read_token
from paperworks.decoding.progress import Progress
from paperworks.decoding.sampling import check_logits
from paperworks.decoding.target import Target


def choose(probabilities: Tensor, exit_threshold: float, stop_threshold: float) -> Tensor:
    """The most likely action where it passes its threshold, CONTINUE where not; (..., 3) to (...).

    Example:
        >>> choose(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]), exit_threshold=0.6, stop_threshold=0.8).tolist()
        [2, 1]
    """
    value, best = probabilities.max(-1)
    sure = ((best == Action.STOP) & (value > stop_threshold)) | ((best == Action.EXIT) & (value > exit_threshold))
    return torch.where(sure, best, int(Action.CONTINUE))


@dataclass
class Completion(Generation):
    """The result of `DynamicInference.generate`.

    Attributes:
        exit_layers: For each new token, how many layers it was given.
        stopped_at: Layers that the token was given at which the completion was stopped, None if it was not.
    """

    exit_layers: list[int]
    stopped_at: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether the controller ended the completion."""
        return self.stopped_at is not None


@dataclass(frozen=True)
class Reading:
    """What heads and controller make of texts at every position, with the true tokens before it.

    Attributes:
        layers: Layers behind which a decision is taken, (points,), ascending; the last is the model's last.
        tokens: The tokens that came, (sequences, length - 1).
        predictions: The token that each point's head would put out, (points, sequences, length - 1).
        probabilities: Of STOP, EXIT and CONTINUE by the controller, (points, sequences, length - 1, 3).
        states: What the controller read, (points, sequences, length - 1, d).
    """

    layers: Tensor
    tokens: Tensor
    predictions: Tensor
    probabilities: Tensor
    states: Tensor = field(repr=False)

    @property
    def first_correct(self) -> Tensor:
        """First point whose head is right, from 1; 0 where none is: (sequences, length - 1)."""
        right = self.predictions == self.tokens
        return torch.where(right.any(0), right.int().argmax(0) + 1, 0)

    @property
    def labels(self) -> Tensor:
        """The action to learn at each point, (points, sequences, length - 1).

        STOP everywhere if no point is right, otherwise CONTINUE up to the first that is and EXIT from there on, also
        where a later point is wrong again.
        """
        first = self.first_correct
        point = torch.arange(1, len(self.layers) + 1).view(-1, 1, 1)
        labels = torch.where(first <= point, int(Action.EXIT), int(Action.CONTINUE))
        return labels.masked_fill(first == 0, int(Action.STOP))

    def decide(self, exit_threshold: float = 0.9, stop_threshold: float = 0.9) -> tuple[Tensor, Tensor]:
        """What the thresholds of `DynamicInference.generate` make of each position, each decided alone.

        Returns:
            Layers given to the position and the token put out, -1 for a stop; both (sequences, length - 1).
        """
        chosen = choose(self.probabilities, exit_threshold, stop_threshold)
        ends = chosen != Action.CONTINUE
        ends[-1] = True
        point = ends.int().argmax(0, keepdim=True)
        tokens = torch.where(chosen == Action.STOP, -1, self.predictions).gather(0, point)
        return self.layers[point[0]], tokens[0]


class Training(TypedDict, total=False):
    """How heads and controller are trained.

    Attributes:
        epochs: Passes over the blocks, 10 by default; may be fractional.
        batch_size: Blocks a step, 12.
        learning_rate: AdamW's, 1e-5, falling to 0 in a line.
        weight_decay: AdamW's, 0.01.
        generator: Order of the blocks.
        progress: Called with 1 after each step.
    """

    epochs: float
    batch_size: int
    learning_rate: float
    weight_decay: float
    generator: torch.Generator | None
    progress: Progress | None


class _TunedHead(nn.Module):
    """What the model's own head is to score: z + A z with z = norm(h); A is 0 at first."""

    def __init__(self, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm).requires_grad_()
        self.correction = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.correction.weight)

    def forward(self, h: Tensor) -> Tensor:
        z = self.norm(h)
        return z + self.correction(z)


class DynamicInference(nn.Module):
    """A causal LM that decides behind its layers whether a token needs more of them.

    A linear map C, shared by all layers, reads the state behind layer i and weighs three actions: EXIT, put out the
    token that this layer's own head predicts; STOP, end the completion, as no layer will get the token right; CONTINUE.
    Keys and values that later layers would have had of a token that left at layer i are made from its state there: each
    layer's own norm and projections, without attention or MLP.

    Make one for a model, then `fit_heads(blocks)` and `fit_controller(others)`. The heads' text should not serve the
    controller too: what heads have learnt by heart makes EXIT look too good. The model itself never changes.

    Args:
        model: A causal LM whose layers stand in one list (GPT-2, CodeGen, Llama, Qwen3, Gemma3 and others alike).
        every: Decide behind layers 1, 1 + every, ... and the last.
        head: "linear" is the paper's, a matrix from a layer's output to all tokens. "tuned" puts a norm and a
            correction of d x d before the model's frozen head, far less to train.
        vocabulary: Tokens (ids) that intermediate heads may put out, None for all; fewer are cheaper to score. What
            lies outside is left to the last layer.

    Raises:
        TypeError: not a causal language model.
        ValueError: an argument out of range, or a model whose layers or final norm are not found.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50)).eval()
        >>> dynamic = DynamicInference(model)
        >>> result = dynamic.generate(torch.tensor([[1, 2, 3]]), exit_threshold=2, stop_threshold=2, eos_token_id=[])
        >>> result.exit_layers, result.stopped
        ([3, 3, 3, 3, 3, 3, 3, 3, 3, 3], False)
        >>> text = torch.randint(50, (4, 16))
        >>> losses = dynamic.fit_heads(text, epochs=1), dynamic.fit_controller(text, epochs=1)
        >>> dynamic.read(text).labels.shape
        torch.Size([3, 4, 15])
    """

    vocabulary: Tensor | None
    rows: Tensor | None
    offsets: Tensor | None
    model: Any

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        head: Literal["linear", "tuned"] = "linear",
        vocabulary: Tensor | None = None,
    ) -> None:
        super().__init__()
        target = Target(model)
        # Tokens are scored from states that leave the layers, which must be such as the head reads.
        target.check_states()
        if target.hidden_size != target.config.hidden_size:
            raise ValueError(
                f"{type(model).__name__} has a projection between its layers and its head: use a model without one, such as "
                "Llama, GPT-2 or a larger OPT"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1, the distance of two decisions in layers, got {every}")
        if head not in ("linear", "tuned"):
            raise ValueError(f"head must be 'linear' or 'tuned', got {head!r}")
        if vocabulary is not None and not set(vocabulary.tolist()) <= set(range(target.vocab_size)):
            raise ValueError(f"vocabulary must hold token ids within 0..{target.vocab_size - 1} of this model's head")
        # Not a submodule: the model's weights are neither trained nor saved here.
        object.__setattr__(self, "model", model)
        last, size = len(layers_of(target)), target.hidden_size
        self.layers = [*range(1, last, every), last]
        self.options = {"every": every, "head": head}
        self.register_buffer("vocabulary", None if vocabulary is None else vocabulary.to(target.device))
        # A tuned head scores with rows of the model's head, copied once; None are all of them.
        scorer = None if self.vocabulary is None or head == "linear" else target.scorer(self.vocabulary)
        self.register_buffer("rows", None if scorer is None else scorer.weight, persistent=False)
        self.register_buffer("offsets", None if scorer is None else scorer.bias, persistent=False)
        words = target.vocab_size if self.vocabulary is None else len(self.vocabulary)
        self.heads = nn.ModuleList(
            _TunedHead(_final_norm(target), size) if head == "tuned" else nn.Linear(size, words, bias=False)
            for _ in self.layers[:-1]
        )
        self.heads.to(target.device, target.dtype)
        # Three rows cost nothing in float32, and thresholds near 1 need more digits than bfloat16 has.
        self.controller = nn.Linear(size, 3, bias=False, device=target.device, dtype=_wide(target.dtype))
        # Their problems are convex; from zero, nothing is likelier than anything else before training.
        for linear in (self.controller, *self.heads):
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.weight)

    # Inference

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 10,
        exit_threshold: float = 0.9,
        stop_threshold: float = 0.9,
        eos_token_id: int | list[int] | None = None,
        policy: Policy | None = None,
    ) -> Completion:
        """Complete one prompt greedily, with as many layers for each token as it seems to need.

        The first new token comes from the prompt's pass, which all layers take part in.

        Args:
            input_ids: The prompt, (1, length) or (length,).
            max_new_tokens: Tokens to add at most.
            exit_threshold: Leave a layer where EXIT is the likeliest action and likelier than this; off above 1.
            stop_threshold: Stop where STOP is the likeliest action and likelier than this; off above 1.
            eos_token_id: Token or tokens that end the text; the model's generation config has the say if None.
            policy: Decides in place of controller and thresholds: takes a layer's number and its output (1, 1, d).

        Raises:
            ValueError: several prompts, an empty one, or one longer than the context; NaN logits.
        """
        prompts = split_prompts(as_prompts(input_ids), None)
        if len(prompts) > 1:
            raise ValueError(
                f"got {len(prompts)} prompts, but each token leaves the model at a layer of its own: complete them one by one"
            )
        begin = perf_counter()
        target = Target(self.model)
        check_lengths(target, prompts, max_new_tokens)
        ends = end_tokens(self.model, eos_token_id)
        policy = policy or self._policy(exit_threshold, stop_threshold)
        cache = ExitCache(target.config, 1)
        logits = target.prefill(prompts, cache)[0]
        tokens, exit_layers = [self._argmax(logits, self.layers[-1])], [self.layers[-1]]
        stopped_at: int | None = None

        def decide(layer: int, hidden: Tensor) -> Action:
            return policy(layer, hidden) if layer in self.layers else Action.CONTINUE

        while len(tokens) < max_new_tokens and int(tokens[-1]) not in ends:
            action, layer, hidden = read_token(target, tokens[-1][None], cache, decide)
            if action == Action.STOP:
                stopped_at = layer
                break
            cache.commit(torch.zeros(1, 1, dtype=torch.long, device=hidden.device), [1])
            tokens.append(self._argmax(self.logits(layer, hidden[:, 0]), layer))
            exit_layers.append(layer)
        new = torch.cat(tokens)
        return Completion(
            sequences=torch.cat([prompts[0], new.to(prompts[0].device)])[None],
            new_tokens=[new.tolist()],
            statistics=Statistics(
                target_calls=len(tokens) - 1 + (stopped_at is not None),
                emitted=[[1] * (len(tokens) - 1)],
                target_seconds=perf_counter() - begin,
            ),
            exit_layers=exit_layers,
            stopped_at=stopped_at,
        )

    def _policy(self, exit_threshold: float, stop_threshold: float) -> Policy:
        if not (exit_threshold >= 0 and stop_threshold >= 0):
            raise ValueError(
                f"thresholds are probabilities, or above 1 to switch an action off, got exit_threshold="
                f"{exit_threshold} and stop_threshold={stop_threshold}"
            )
        if exit_threshold >= 1 and stop_threshold >= 1:
            return lambda layer, hidden: Action.CONTINUE
        return lambda layer, hidden: Action(int(choose(self.weigh(hidden)[0, 0], exit_threshold, stop_threshold)))

    def weigh(self, hidden: Tensor) -> Tensor:
        """The controller's probabilities of STOP, EXIT and CONTINUE for layer outputs: (..., d) to (..., 3)."""
        weight = self.controller.weight
        return F.linear(hidden.to(weight.dtype), weight).softmax(-1)

    def logits(self, layer: int, hidden: Tensor) -> Tensor:
        """Scores by the head behind one of `layers`, (..., d) to (..., vocab or tokens of `vocabulary`).

        Args:
            layer: Its number.
            hidden: Its output; behind the last layer the model's own head reads, as always, what the final norm makes.

        Raises:
            ValueError: no head stands behind that layer.
        """
        if layer not in self.layers:
            raise ValueError(f"no head stands behind layer {layer}, only behind {self.layers}")
        target = Target(self.model)
        if layer == self.layers[-1]:
            return target.logits(hidden)
        scored: Tensor = self.heads[self.layers.index(layer)](hidden)
        if self.options["head"] == "linear":
            return scored
        scorer = target.scorer()
        return (scorer if self.rows is None else replace(scorer, weight=self.rows, bias=self.offsets))(scored)

    def _argmax(self, logits: Tensor, layer: int) -> Tensor:
        """The best token's id, (...,): heads before the last score the tokens of `vocabulary`."""
        check_logits(logits)
        best = logits.argmax(-1)
        return best if self.vocabulary is None or layer == self.layers[-1] else self.vocabulary[best]

    # Training

    def fit_heads(self, blocks: Tensor, **training: Unpack[Training]) -> list[float]:
        """Train the intermediate heads to predict the next token: the sum over heads of their cross-entropies.

        Args:
            blocks: Token ids of code, (blocks, length); the paper's blocks have 256 tokens.
            **training: See `Training`.

        Returns:
            The loss of each step.

        Raises:
            ValueError: a value out of range, blocks that hold no text of this model, or a loss that is not finite.
        """
        wide, half = _wide(self.model.dtype), self.model.dtype in (torch.bfloat16, torch.float16)

        def losses(rows: Tensor) -> Iterator[Tensor]:
            target = Target(self.model)
            tokens = blocks[rows].to(target.device)
            labels = tokens[:, 1:]
            if self.vocabulary is not None:
                place = torch.full((target.vocab_size,), -1, device=target.device)
                place[self.vocabulary] = torch.arange(len(self.vocabulary), device=target.device)
                labels = place[labels]
            keep = labels >= 0
            with torch.no_grad():
                states, _ = layer_outputs(target, tokens, self.layers[:-1])
            # The heads share nothing: one after the other, a single table of scores is in memory.
            for layer, hidden in zip(self.layers[:-1], states[:, :, :-1], strict=True):
                with torch.autocast(target.device.type, torch.bfloat16, enabled=half):
                    scores = self.logits(layer, hidden[keep].to(wide))
                total = F.cross_entropy(scores.to(wide), labels[keep], reduction="sum")
                yield total / keep.sum().clamp(min=1)

        return self._fit(self.heads, blocks, losses, **training)

    def fit_controller(self, blocks: Tensor, **training: Unpack[Training]) -> list[float]:
        """Train the controller, and nothing else, on `Reading.labels`; arguments and errors as for `fit_heads`."""
        reading = self.read(blocks)
        states, labels, weight = reading.states, reading.labels, self.controller.weight
        # Some entries of a state are a thousand times others, and each step of AdamW moves all weights alike: train on
        # entries of one size. C (h / size) with C = C' size is the same map as C' h.
        size = states.abs().mean((0, 1, 2), dtype=weight.dtype).clamp(min=1e-6).to(weight.device)

        def losses(rows: Tensor) -> Iterator[Tensor]:
            yield self.controller_loss(states[:, rows].to(weight) / size, labels[:, rows].to(weight.device))

        weight.data *= size
        try:
            return self._fit(self.controller, blocks, losses, **training)
        finally:
            weight.data /= size

    def controller_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the controller with its labels, the mean over points weighted by their number 1, 2, ...

        Args:
            states: Layer outputs, (points, ..., d).
            labels: Actions, (points, ...).
        """
        weight = self.controller.weight
        scores = F.linear(states.to(weight.dtype), weight)
        each = F.cross_entropy(scores.movedim(-1, 1), labels, reduction="none").flatten(1).mean(1)
        depth = torch.arange(1, len(each) + 1, device=each.device, dtype=each.dtype)
        return (depth * each).sum() / depth.sum()

    @torch.no_grad()
    def read(self, blocks: Tensor, *, batch_size: int = 8, progress: Progress | None = None) -> Reading:
        """Apply every head and the controller to `blocks` (blocks, length); kept on the CPU, `states` are the most of it."""
        self._check_blocks(blocks)
        target, parts = Target(self.model), []
        for part in blocks.split(batch_size):
            states, final = layer_outputs(target, part[:, :-1].to(target.device), self.layers)
            best = [
                self._argmax(self.logits(layer, hidden), layer)
                for layer, hidden in zip(self.layers, (*states[:-1], final), strict=True)
            ]
            parts.append([torch.stack(best).cpu(), self.weigh(states).cpu(), states.cpu()])
            if progress is not None:
                progress(len(part))
        return Reading(
            torch.tensor(self.layers), blocks[:, 1:].cpu(), *(torch.cat(part, 1) for part in zip(*parts, strict=True))
        )

    def _check_blocks(self, blocks: Tensor) -> None:
        if blocks.ndim != 2 or blocks.dtype != torch.int64 or not len(blocks) or blocks.shape[1] < 2:
            raise ValueError(
                f"blocks must be int64 token ids of shape (blocks, length), at least 1 x 2, got {blocks.dtype} of shape "
                f"{tuple(blocks.shape)}"
            )
        size = Target(self.model).vocab_size
        if int(blocks.min()) < 0 or int(blocks.max()) >= size:
            raise ValueError(f"blocks hold token ids outside 0..{size - 1}: wrong tokenizer?")

    def _fit(
        self,
        module: nn.Module,
        blocks: Tensor,
        losses: Callable[[Tensor], Iterator[Tensor]],
        *,
        epochs: float = 10.0,
        batch_size: int = 12,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.01,
        generator: torch.Generator | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        if epochs <= 0 or batch_size < 1 or learning_rate <= 0 or weight_decay < 0:
            raise ValueError(
                "epochs and learning_rate must be positive, batch_size at least 1 and weight_decay not negative"
            )
        self._check_blocks(blocks)
        dtype = self.controller.weight.dtype if module is self.controller else self.model.dtype
        steps = max(1, round(epochs * len(blocks) / batch_size))
        try:
            module.to(_wide(dtype))
            optimiser = torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
            history: list[float] = []
            order: list[Tensor] = []
            for _ in range(steps):
                order = order or list(torch.randperm(len(blocks), generator=generator).split(batch_size))
                optimiser.zero_grad(set_to_none=True)
                total = 0.0
                for loss in losses(order.pop(0)):
                    loss.backward()
                    total += loss.item()
                if not total < float("inf"):
                    raise ValueError(f"the training loss became {total} at step {len(history)}: lower learning_rate")
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                history.append(total)
                if progress is not None:
                    progress(1)
        finally:
            for parameter in module.parameters():
                parameter.grad = None
            module.to(dtype)
        return history

    # Saving

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be; the model is not in it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        config = {"class": type(self).__name__, "made_for": identity(self.model), **self.options}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> Self:
        """Heads and controller saved in `folder`, for `model`; device and dtype follow the model.

        Raises:
            TypeError: there is no model.
            ValueError: the folder holds none, or those of another model.
        """
        folder = Path(folder)
        if model is None:
            raise TypeError(
                f"heads are loaded for the model that they belong to: {cls.__name__}.from_pretrained({str(folder)!r}, model)"
            )
        try:
            config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
            made_for = config.pop("made_for", None)
            if config.pop("class") != cls.__name__:
                raise ValueError("another class was saved there")
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} holds no saved {cls.__name__}: {error}") from error
        if made_for is not None and (reason := difference(made_for, model)):
            raise ValueError(f"what {folder} holds was made for another model: {reason}")
        dynamic = cls(model, vocabulary=weights.get("vocabulary"), **config)
        try:
            dynamic.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"what {folder} holds was made for another model: {error}") from error
        return dynamic


def _final_norm(target: Target) -> nn.Module:
    """The norm between the last layer and the head: the only one beside the layers, or the one behind them."""
    parts = list(target.base.children())
    norms = [part for part in parts if "norm" in type(part).__name__.lower()]
    if len(norms) > 1:
        norms = [norm for norm in norms if parts.index(norm) > parts.index(layers_of(target))]
    if len(norms) != 1:
        raise ValueError(f"{type(target.model).__name__} has no final norm that is known: use head='linear'")
    return norms[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
