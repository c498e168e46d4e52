"""One prompt, continued with a trained drafter: what `paperworks generate` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.run import Display, Run


@dataclass(frozen=True)
class Written:
    """A continued prompt and what it cost.

    Attributes:
        text: The new text.
        tokens: New tokens.
        seconds: From the prompt to the last token, without loading and training.
        accepted_per_call: Tokens that a pass of the model gave, behind the prompt's pass; 1 where there was none.
    """

    text: str
    tokens: int
    seconds: float
    accepted_per_call: float

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def write(
    prompt: str,
    *,
    model: str = "smollm2-135m",
    method: str = "hydra",
    drafter: Path | None = None,
    chat: bool = True,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], object] = lambda text: None,
    display: Display | None = None,
) -> Written:
    """Continue `prompt`, handing over each piece of text as it comes.

    Args:
        prompt: What the user says.
        model: Name of the model.
        method: "plain", or a drafter of `paperworks.recipes.decoding.drafting.DRAFTERS` in any case. It is trained on text that the
            model writes itself, as its recipe does by default, and kept.
        drafter: Folder of a saved drafter to use instead.
        chat: Put the prompt into the model's chat template, where it has one.
        max_new_tokens: New tokens at most.
        temperature: 0 for greedy text.
        top_k: Sample among the k most likely tokens.
        top_p: Sample among the most likely tokens that make up this probability.
        seed: Of what is sampled.
        on_text: Called with each piece of text.
        display: Shows progress while a drafter is trained.

    Raises:
        UsageError: There is no such method, or a value is out of range.

    Example:
        >>> write("Hello", model="tiny-random-llama", method="plain", max_new_tokens=4).tokens <= 4
        True
    """
    import torch
    from transformers import TextStreamer

    from paperworks.decoding import Drafter, generate
    from paperworks.recipes.decoding.drafting import cpu_friendly_dtype, encode, load_target

    target, tokenizer = load_target(model, dtype=cpu_friendly_dtype())
    try:
        chosen = (
            Drafter.from_pretrained(drafter, target) if drafter else _drafter(method, target, tokenizer, model, display)
        )
        if display is not None:
            display.close()
        pieces: list[str] = []

        class Pieces(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                on_text(text)

        ids = encode(tokenizer, prompt, chat=chat).to(target.device)
        start = perf_counter()
        result = generate(
            target, ids, drafter=chosen, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
            top_p=top_p, generator=torch.Generator(target.device).manual_seed(seed),
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )  # fmt: skip
        seconds = perf_counter() - start
    except ValueError as error:
        raise UsageError(str(error)) from error
    cost = result.statistics
    return Written(
        "".join(pieces), len(result.new_tokens[0]), seconds, cost.accepted_per_call if cost.target_calls else 1.0
    )


def _drafter(method: str, target: Any, tokenizer: Any, model: str, display: Display | None) -> Any:
    """The drafter called `method`, trained as its recipe trains it; None for plain decoding."""
    from paperworks.recipes.decoding.drafting import DRAFTERS, Drafting, trained

    if method.lower() == "plain":
        return None
    name = next((name for name in DRAFTERS if name.lower() == method.lower()), None)
    if name is None:
        raise UsageError(f"there is no method {method!r}, only plain, {', '.join(name.lower() for name in DRAFTERS)}")
    # The recipes' own parameters make the same key, so that what `paperworks run` trained is used again.
    work = Drafting()
    return trained(
        Run("hydra", display=display), name, target, tokenizer, model=model, tokens=work.train_tokens,
        epochs=work.epochs, vocabulary=work.draft_vocabulary, nodes=work.nodes, seed=0,
    )  # fmt: skip
