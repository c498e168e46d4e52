"""AttributeClassifier: does a text that begins like this end well? Read off the model's own states (arXiv 2311.08817)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paperworks.decoding.target import Target
from paperworks.decoding.training import DraftingData

Degeneracy = Literal["empty", "unfinished", "repetitive", "short", "long"]


def degeneracy(
    tokens: Sequence[int],
    ends: Collection[int],
    *,
    ngram: int = 4,
    repeated: float = 0.2,
    lengths: tuple[int, int] | None = None,
) -> Degeneracy | None:
    """What is wrong with a finished text, or None.

    Args:
        tokens: The new tokens, the end token included where one came.
        ends: Tokens that end a text.
        ngram: Length of the token sequences that should not come back.
        repeated: Share of them that may, within [0, 1].
        lengths: Least and largest number of tokens wanted before the end token; any from 1 on if None.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> [degeneracy(text, {0}) for text in ([0], [3, 4], [3, 4, 3, 4, 3, 4, 3, 4, 0], [3, 4, 0])]
        ['empty', 'unfinished', 'repetitive', None]
    """
    if ngram < 1 or not 0 <= repeated <= 1:
        raise ValueError(f"ngram must be at least 1 and repeated within [0, 1], got {ngram} and {repeated}")
    finished = bool(tokens) and tokens[-1] in ends
    text = tuple(tokens[:-1] if finished else tokens)
    if not text:
        return "empty"
    grams = [text[start : start + ngram] for start in range(len(text) - ngram + 1)]
    if grams and 1 - len(set(grams)) / len(grams) > repeated:
        return "repetitive"
    if not finished:
        return "unfinished"
    if lengths is not None and not lengths[0] <= len(text) <= lengths[1]:
        return "short" if len(text) < lengths[0] else "long"
    return None


@dataclass(frozen=True)
class Fit:
    """How well a classifier predicts.

    Attributes:
        losses: Cross-entropy in nats of each training step.
        held_out_loss: That of held-out texts' prefixes, with the temperature.
        prior_loss: That of the training texts' base rate on the same prefixes.
        temperature: What divides the logits, within [1, 20].
    """

    losses: list[float]
    held_out_loss: float
    prior_loss: float
    temperature: float


class AttributeClassifier(nn.Module):
    """A small head on a frozen model's states: log p(a | x_<=t), the chance that a text that begins so has attribute a.

    It is trained on texts sampled from the model, each prefix with the label of its finished text, so that it predicts
    what the model would make of the prefix. A temperature fitted on held-out texts keeps it from being too sure. What it
    sees of a prefix is the last state and how many tokens there are.

    Make one with `AttributeClassifier.from_target(model, max_new_tokens=...)`, sample with `generate`, read the states
    with `collect`, label with `degeneracy` or a rule of your own, `fit`, and pass it to `ConditionalBeamSearch`.

    Args:
        hidden_size: Width d of the model's states.
        max_new_tokens: Length that texts are cut at: the scale of the number of tokens.
        width: Units of the hidden layer; 0 for a linear classifier.

    Raises:
        ValueError: a value out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from paperworks.decoding import collect
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> _ = torch.manual_seed(0)
        >>> model = LlamaForCausalLM(config).eval()
        >>> texts = [[token, token + 1, token + 2] for token in range(40)]
        >>> classifier = AttributeClassifier.from_target(model, max_new_tokens=3)
        >>> labels = torch.tensor([text[0] < 20 for text in texts])
        >>> fit = classifier.fit(collect(model, [([1], text) for text in texts]), labels)
        >>> hidden, prefix = torch.zeros(2, 32), torch.zeros(2, 1, dtype=torch.long)
        >>> classifier(hidden, prefix).shape, fit.held_out_loss < fit.prior_loss
        (torch.Size([2]), True)
    """

    temperature: Tensor

    def __init__(self, hidden_size: int, max_new_tokens: int, *, width: int = 64) -> None:
        super().__init__()
        if hidden_size < 1 or max_new_tokens < 1 or width < 0:
            raise ValueError(
                f"hidden_size and max_new_tokens must be at least 1 and width at least 0, got {hidden_size}, "
                f"{max_new_tokens} and {width}"
            )
        self.config = {"hidden_size": hidden_size, "max_new_tokens": max_new_tokens, "width": width}
        inputs = hidden_size + 1
        if width:
            self.layers: nn.Module = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, 1))
        else:
            self.layers = nn.Linear(inputs, 1)
        self.register_buffer("temperature", torch.ones(()))

    @classmethod
    def from_target(cls, model: nn.Module, max_new_tokens: int, *, width: int = 64) -> Self:
        """An untrained classifier for `model`, on its device, in float32."""
        target = Target(model)
        return cls(target.hidden_size, max_new_tokens, width=width).to(target.device)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability (...) that a text with this prefix has the attribute.

        Args:
            hidden: The model's state behind each prefix, (..., d).
            tokens: The prefix's new tokens, (..., length).
        """
        counts = torch.full(hidden.shape[:-1], tokens.shape[-1], device=hidden.device)
        return F.logsigmoid(self.logits(hidden, counts) / self.temperature)

    def logits(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """Uncalibrated log-odds (...) of states (..., d) behind prefixes of `counts` (...) new tokens."""
        # States differ in size by orders of magnitude between models; their direction is what tells.
        states = F.layer_norm(hidden.float(), hidden.shape[-1:])
        progress = (counts / self.config["max_new_tokens"]).float()[..., None]
        logits: Tensor = self.layers(torch.cat([states, progress], dim=-1))[..., 0]
        return logits

    def fit(
        self,
        data: DraftingData,
        labels: Tensor,
        *,
        held_out: float = 0.2,
        epochs: int = 10,
        batch_size: int = 256,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Fit:
        """Train in place with AdamW at a falling rate, then fit the temperature.

        Args:
            data: Sampled texts and their states, from `collect`.
            labels: Whether each text has the attribute, bool, (texts,).
            held_out: Share of the texts, drawn at random, that only the temperature is fitted on.
            epochs: Passes over the prefixes of the others.
            batch_size: Prefixes a step.
            learning_rate: AdamW's at first.
            weight_decay: AdamW's.
            generator: Order and choice of held-out texts, on the CPU.
            progress: Called with 1 after each epoch.

        Raises:
            ValueError: labels of another shape, all alike, or a value out of range.
        """
        if labels.shape != (len(data),) or labels.dtype != torch.bool:
            raise ValueError(
                f"labels must be bool of shape ({len(data)},), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not 0 < held_out < 1 or epochs < 1 or batch_size < 1 or learning_rate <= 0:
            raise ValueError("held_out must be within (0, 1), epochs and batch_size at least 1, learning_rate positive")
        order = torch.randperm(len(data), generator=generator)
        cut = max(1, round(held_out * len(data)))
        kept, train = order[:cut], order[cut:]
        if not len(train) or len(labels[train].unique()) < 2:
            raise ValueError(
                f"the {len(train)} texts to train on all have the same label: sample more texts, or at other temperatures"
            )
        hidden, counts, truth = self._prefixes(data, labels, train)
        optimiser = torch.optim.AdamW(self.parameters(), learning_rate, weight_decay=weight_decay)
        # The rate falls to nothing: what it leaves of the noise of single steps would stay in the probabilities.
        total = epochs * -(-len(truth) // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total)
        losses = []
        for _ in range(epochs):
            for rows in torch.randperm(len(truth), generator=generator).to(truth.device).split(batch_size):
                loss = F.binary_cross_entropy_with_logits(self.logits(hidden[rows], counts[rows]), truth[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
            if progress is not None:
                progress(1)
        base = truth.mean().logit()
        hidden, counts, truth = self._prefixes(data, labels, kept)
        with torch.no_grad():
            logits = self.logits(hidden, counts)
        self.temperature.fill_(_temperature(logits, truth))
        return Fit(
            losses,
            float(F.binary_cross_entropy_with_logits(logits / self.temperature, truth)),
            float(F.binary_cross_entropy_with_logits(base.expand_as(truth), truth)),
            float(self.temperature),
        )

    def _prefixes(self, data: DraftingData, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all prefixes of the texts `rows`: states, numbers of new tokens, and the texts' labels."""
        device, mask = self.temperature.device, data.mask[rows]
        truth = labels[rows].float()[:, None].expand(mask.shape)
        return data.hidden[rows][mask].to(device), mask.cumsum(1)[mask].to(device), truth[mask].to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """The classifier saved in `folder`.

        Raises:
            ValueError: the folder holds none.
        """
        folder = Path(folder)
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            classifier = cls(**config)
            classifier.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{folder} holds no saved attribute classifier: {error}") from error
        return classifier.to(device)


def _temperature(logits: Tensor, truth: Tensor) -> float:
    """The divisor of the logits under which the labels are most likely; the loss is convex in its inverse."""
    inverse = torch.ones((), device=logits.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(logits * inverse, truth)
        value.backward()
        return value

    optimiser.step(loss)
    # Held-out texts all of one label, or a classifier that knows nothing, would ask for no temperature at all.
    return 1 / min(max(inverse.item(), 0.05), 1.0)
