"""HiddenStateOptimization: gradient steps on what a model remembers, in place of its weights (arXiv 2112.08653)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from paperworks.decoding.cache import TreeCache, _TreeLayer
from paperworks.decoding.engine import Generation, Statistics, as_prompts, check_lengths, end_tokens, split_prompts
from paperworks.decoding.sampling import Sampling, check_logits, draw
from paperworks.decoding.target import Target
from paperworks.decoding.tree import TokenTree


class HiddenStateOptimization:
    """Better predictions without training: the states of the text read so far learn from it (arXiv 2112.08653).

    The cached keys and values h of every layer are parameters, the weights are not. The text is read window by window.
    Once the tokens of a window are known, `steps` gradient steps on

        loss(h) = -sum log p(x_t | h)    over the tokens x_t of the window

    change the states of all tokens up to there, those of the window included, and the next window is predicted with the
    improved states. No token is ever predicted by states that have seen it. Keys keep the positions they were made
    with. Reading takes two to three times as long, and the two moments of Adam twice the memory of the cache. A model in
    half precision reads with it, but its states are kept and changed in float32: most steps are smaller than what half
    precision tells apart.

    Args:
        model: A transformers causal LM (Llama, Qwen2, Qwen3, Gemma3 and others alike).
        steps: Gradient steps a window; 0 leaves the model as it is.
        learning_rate: Of the steps. The gain rises with it until it turns over; with SmolLM2-135M on WikiText 0.01 is
            better than the default.
        window: Tokens that are read before their states are improved. Smaller is better and slower.
        optimizer: "adam", whose moments and step count belong to each state, so that a state keeps its own while the
            cache grows; or "sgd".
        betas: Adam's.
        epsilon: Adam's.

    Raises:
        TypeError: not a causal language model.
        ValueError: a value out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> config = LlamaConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> text = torch.tensor([[1, 2, 3, 4] * 8])
        >>> improved = HiddenStateOptimization(model, learning_rate=0.05, window=4).log_likelihood(text)
        >>> plain = HiddenStateOptimization(model, steps=0, window=4).log_likelihood(text)
        >>> improved.shape, bool((improved[:, :4] == plain[:, :4]).all()), bool(improved.mean() > plain.mean())
        (torch.Size([1, 31]), True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 1,
        learning_rate: float = 0.003,
        window: int = 32,
        optimizer: Literal["adam", "sgd"] = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        if steps < 0 or window < 1:
            raise ValueError(f"steps must be at least 0 and window at least 1 token, got {steps} and {window}")
        if not 0 < learning_rate < float("inf") or epsilon <= 0:
            raise ValueError(f"learning_rate and epsilon must be positive, got {learning_rate} and {epsilon}")
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be 'adam' or 'sgd', got {optimizer!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be within [0, 1), got {betas}")
        Target(model)
        self.model = model
        self.steps = steps
        self.learning_rate = learning_rate
        self.window = window
        self.optimizer = optimizer
        self.betas = betas
        self.epsilon = epsilon

    @torch.inference_mode(False)
    @torch.no_grad()
    def log_likelihood(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability in nats of every token but the first, each predicted before it is learnt from.

        Args:
            input_ids: Texts, shape (batch, length) or (length,).
            attention_mask: 0 where a text is padding, on either side; shape of `input_ids`.

        Returns:
            Shape (batch, longest - 1), entry t for token t + 1 of the text without its padding, 0 behind a shorter
            text's end.

        Raises:
            ValueError: an empty text, one longer than the model's context, or NaN logits.
        """
        target, cache, tokens, known = self._start(input_ids, attention_mask)
        return self._read(target, cache, tokens, known)

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int = 0,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Continue prompts with states that learn from the prompt and then, window by window, from the new text.

        Args:
            input_ids: Prompts, shape (batch, length) or (length,).
            attention_mask: 0 where a prompt is padding, on either side; shape of `input_ids`.
            max_new_tokens: Tokens to add at most.
            temperature: 0 for greedy decoding.
            top_k: Sample among the k most likely tokens.
            top_p: Sample among the most likely tokens that make up this probability.
            eos_token_id: Token or tokens that end a row; the model's generation config has the say if None, [] for none.
            pad_token_id: Fills rows that ended early.
            generator: Source of randomness.

        Returns:
            A `Generation`; its target calls are those that wrote a token, not those that learnt.

        Raises:
            ValueError: an empty prompt, max_new_tokens below 1, a prompt longer than the context, NaN logits, or a
                sampling value out of range.
        """
        sampling = Sampling(temperature, top_k, top_p)
        target, cache, tokens, known = self._start(input_ids, attention_mask, max_new_tokens)
        ends = torch.tensor(sorted(end_tokens(self.model, eos_token_id)), dtype=torch.long, device=tokens.device)
        first, limits = known, known + max_new_tokens
        calls = 0
        while bool((known < limits).any()):
            # The prompt, or the window just written: its tokens are known now, and can be learnt from.
            self._read(target, cache, tokens, known)
            start = cache.lengths[:]
            for _ in range(self.window):
                alive = known < limits
                if not bool(alive.any()):
                    break
                last = tokens.gather(1, known[:, None] - 1)
                logits = target.verify(TokenTree.chain(last), cache)[0][:, -1]
                check_logits(logits)
                chosen = logits.argmax(-1) if sampling.greedy else draw(sampling.probabilities(logits), generator)
                cache.commit(torch.zeros_like(last), alive.long().tolist())
                tokens[alive, known[alive]] = chosen[alive]
                known = known + alive
                limits = known.where(alive & torch.isin(chosen, ends), limits)
                calls += 1
            if self.steps:
                cache.lengths[:] = start
        new = [row[begin:end].tolist() for row, begin, end in zip(tokens, first.tolist(), known.tolist(), strict=True)]
        longest = max(map(len, new))
        padded = torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in new], device=input_ids.device)
        sequences = torch.cat([input_ids.view(len(new), -1), padded], dim=1)
        return Generation(sequences, new, Statistics(target_calls=calls, emitted=[[1] * len(row) for row in new]))

    @torch.inference_mode(False)
    @torch.no_grad()
    def classify(self, input_ids: Tensor, labels: Tensor, choices: Sequence[Tensor]) -> Tensor:
        """Log-probability of each answer behind a few-shot prompt whose states have learnt its examples' labels.

        The prompt is read at once, whatever the window, and the loss is that of the label tokens alone.

        Args:
            input_ids: Examples with their labels, then the question: (1, length) or (length,).
            labels: Which of these tokens are the examples' labels, bool, shape of `input_ids`.
            choices: Token ids of each answer, 1-D.

        Returns:
            Log-probabilities in nats, (choices,).

        Raises:
            ValueError: several prompts, no answers or an empty one, shapes that differ, or a label in first place, which
                nothing predicts.
        """
        if not choices or not all(choice.ndim == 1 and len(choice) for choice in choices):
            raise ValueError("choices must be one or more 1-D tensors of at least one token id each")
        answers = nn.utils.rnn.pad_sequence(list(choices), batch_first=True).long()
        target, cache, tokens, known = self._start(input_ids, None, answers.shape[1])
        observed = labels.view(len(tokens), -1).bool().to(tokens.device)
        if len(tokens) != 1 or labels.shape != input_ids.shape or bool(observed[0, 0]):
            raise ValueError(
                f"expected one prompt and a mask of its shape that leaves out the first token, got input_ids of shape "
                f"{tuple(input_ids.shape)} and labels of shape {tuple(labels.shape)}"
            )
        check_lengths(target, list(choices), 1)
        length = int(known)
        if length > 1:
            inputs, nexts = tokens[:, : length - 1], tokens[:, 1:length]
            self._observe(target, cache, inputs, nexts, observed[:, 1:], [length - 1])
        cache.select([0] * len(choices))
        answers = answers.to(tokens.device)
        question = tokens[:, length - 1 : length].expand(len(choices), 1)
        predicted = _log_likelihood(target, cache, torch.cat([question, answers[:, :-1]], dim=1), answers)
        said = [torch.ones(len(choice), device=tokens.device) for choice in choices]
        return (predicted * nn.utils.rnn.pad_sequence(said, batch_first=True)).sum(-1)

    def _start(
        self, input_ids: Tensor, attention_mask: Tensor | None, new: int | None = None
    ) -> tuple[Target, _StateCache, Tensor, Tensor]:
        """An empty cache; the texts padded on the right, with room for `new` tokens; and their lengths, (batch,)."""
        target = Target(self.model)
        texts = split_prompts(as_prompts(input_ids), attention_mask)
        if new is not None:
            check_lengths(target, texts, new)
        else:
            # The last token is predicted but never read: it takes no place in the context.
            check_lengths(target, [text[: max(1, len(text) - 1)] for text in texts], 1)
            check_lengths(target, [text[-1:] for text in texts], 1)
        # Copies, since tensors that were made in inference mode cannot take part in gradients.
        tokens = nn.utils.rnn.pad_sequence([text.clone().to(target.device) for text in texts], batch_first=True)
        descent = _Descent(self.optimizer, self.learning_rate, self.betas, self.epsilon)
        known = torch.tensor([len(text) for text in texts], device=target.device)
        return target, _StateCache(target.config, len(texts), descent), F.pad(tokens, (0, new or 0)), known

    def _read(self, target: Target, cache: _StateCache, tokens: Tensor, known: Tensor) -> Tensor:
        """Read each row window by window up to its last known token, which is input to what comes next, and learn.

        Returns:
            Log-probability of each token but the first that is label here, (batch, length - 1), 0 elsewhere.
        """
        predicted = torch.zeros(tokens[:, 1:].shape, device=tokens.device)
        while True:
            read = torch.tensor(cache.lengths, device=tokens.device)
            counts = (known - 1 - read).clamp(max=self.window)
            if not bool(counts.any()):
                return predicted
            line = torch.arange(int(counts.max()), device=tokens.device)
            observed = line < counts[:, None]
            slots = (read[:, None] + line).where(observed, 0)
            inputs, labels = tokens.gather(1, slots), tokens.gather(1, slots + 1)
            new = self._observe(target, cache, inputs, labels, observed, counts.tolist())
            predicted.scatter_add_(1, slots, (new * observed).to(predicted.dtype))

    def _observe(
        self, target: Target, cache: _StateCache, inputs: Tensor, labels: Tensor, observed: Tensor, counts: list[int]
    ) -> Tensor:
        """Log-probabilities of `labels` (batch, n) behind `inputs`; then improve the states by those `observed`."""
        steps = self.steps if bool(observed.any()) else 0
        with torch.set_grad_enabled(steps > 0):
            predicted = log_likelihood = _log_likelihood(target, cache, inputs, labels)
            for step in range(steps):
                if step:
                    log_likelihood = _log_likelihood(target, cache, inputs, labels)
                cache.improve(-(log_likelihood * observed).sum(), observed.any(-1), counts)
        cache.commit(torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs), counts)
        return predicted.detach()


def _log_likelihood(target: Target, cache: TreeCache, inputs: Tensor, labels: Tensor) -> Tensor:
    """Log-probability (batch, n) of each label (batch, n) behind its input and all before."""
    logits, _ = target.verify(TokenTree.chain(inputs), cache)
    check_logits(logits.detach())
    law = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return law.gather(-1, labels[..., None])[..., 0]


class _Descent:
    """Gradient steps on states (batch, heads, slots, d) that become more; Adam counts its steps for each by itself."""

    def __init__(self, rule: str, learning_rate: float, betas: tuple[float, float], epsilon: float) -> None:
        self.rule, self.learning_rate, self.betas, self.epsilon = rule, learning_rate, betas, epsilon
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.taken = torch.zeros(1, 1, 0, 1)

    def step(self, states: list[Tensor], gradients: Sequence[Tensor], active: Tensor) -> None:
        """Change `states` in place where `active` (batch, 1, slots, 1); elsewhere the gradients are zero."""
        if self.rule == "sgd":
            for state, gradient in zip(states, gradients, strict=True):
                state.sub_(gradient, alpha=self.learning_rate)
            return
        if not self.moments:
            self.moments = [(state[:, :, :0], state[:, :, :0]) for state in states]
            self.taken = self.taken.to(active.device).expand(len(active), -1, -1, -1)
        self.taken = F.pad(self.taken, (0, 0, 0, active.shape[2] - self.taken.shape[2])) + active
        first, second = self.betas
        ages = self.taken.clamp(min=1).to(states[0].dtype)
        rate, scale = self.learning_rate / (1 - first**ages), 1 - second**ages
        for index, (state, gradient) in enumerate(zip(states, gradients, strict=True)):
            mean, square = (
                F.pad(moment, (0, 0, 0, state.shape[2] - moment.shape[2])) for moment in self.moments[index]
            )
            mean = torch.lerp(gradient, mean, first).where(active, mean)
            square = torch.lerp(gradient.square(), square, second).where(active, square)
            self.moments[index] = mean, square
            state.sub_(rate * mean / ((square / scale).sqrt() + self.epsilon) * active)


class _StateLayer(_TreeLayer):
    """A layer's keys and values, to each of which a pass adds an offset that gradients are taken for.

    The new tokens' own states have one too. A gradient counts all that a state does, to the layers above as well. States
    and offsets are in float32 at least, whatever the model reads with.
    """

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.offsets: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(key_states.dtype, torch.float32)
        keys, values = super().update(key_states.to(wide), value_states.to(wide))
        if torch.is_grad_enabled() and not self.offsets:
            self.offsets = [torch.zeros_like(states, requires_grad=True) for states in (keys, values)]
        if self.offsets:
            keys, values = keys + self.offsets[0], values + self.offsets[1]
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class _StateCache(TreeCache):
    """A cache whose keys and values learn while it grows."""

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, batch: int, descent: _Descent) -> None:
        super().__init__(config, batch)
        self.layers = [_StateLayer(self.lengths) for _ in self.layers]
        self.descent = descent

    def improve(self, loss: Tensor, learning: Tensor, counts: list[int]) -> None:
        """One step down `loss` for the states, `counts` new ones included, of the rows that are `learning` (batch,)."""
        offsets = [offset for layer in self.layers for offset in layer.offsets]
        gradients = torch.autograd.grad(loss, offsets)
        ends = torch.tensor(self.lengths, device=loss.device) + torch.tensor(counts, device=loss.device)
        slots = torch.arange(offsets[0].shape[2], device=loss.device)
        active = learning[:, None] & (slots < ends[:, None])
        with torch.no_grad():
            self.descent.step(offsets, gradients, active[:, None, :, None])
        for layer in self.layers:
            # What is stored must not lead back to the pass that made it.
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def commit(self, path: Tensor, counts: list[int]) -> None:
        """Keep the new tokens, in the order they were read, and what all states have learnt."""
        for layer in self.layers:
            for states, offset in zip((layer.keys, layer.values), layer.offsets, strict=False):
                states[:, :, : offset.shape[2]] += offset.detach()
            layer.offsets = []
        super().commit(path, counts)
