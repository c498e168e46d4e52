"""One prompt, continued with a trained drafter: what `paperworks generate` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from paperworks.errors import UsageError
from paperworks.lab.display import Display
from paperworks.lab.run import Run


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
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], object] = lambda text: None,
    display: Display | None = None,
) -> Written:
    """Continue `prompt`, handing over each piece of text as it comes.

    What the model's generation config asks for (a repetition penalty, say, or how to sample) is kept to, but for what is
    given here.

    Args:
        prompt: What the user says.
        model: Name of the model.
        method: "plain", or a drafter of `paperworks.recipes.decoding.drafting.DRAFTERS` in any case. Hydra's heads for
            smollm2-135m come with the package; else it is trained on text that the
            model writes itself, as its recipe does by default, and kept; its tree is the one of most tokens a second on
            this machine, where that is fixed, or none where no drafting pays.
        drafter: Folder of a saved drafter to use instead, such as `paperworks.consult.training.train` leaves.
        chat: Put the prompt into the model's chat template, where it has one.
        max_new_tokens: New tokens at most.
        temperature: 0 for greedy text; if None, as the model's generation config has it.
        top_k: Sample among the k most likely tokens; if None likewise.
        top_p: Sample among the most likely tokens that make up this probability; if None likewise.
        seed: Of what is sampled.
        on_text: Called with each piece of text.
        display: Shows progress while a drafter is trained.

    Raises:
        UsageError: There is no such method, a value is out of range, or the model's generation config asks for something
            that drafting cannot do.

    Example:
        >>> write("Hello", model="tiny-random-llama", method="plain", max_new_tokens=4).tokens <= 4
        True
    """
    import torch
    from transformers import TextStreamer

    from paperworks.decoding import Drafter, Target
    from paperworks.decoding.engine import check_lengths, generate_as_asked
    from paperworks.decoding.options import refuse
    from paperworks.nn import pack_linears
    from paperworks.recipes.decoding.drafting import cpu_friendly_dtype, encode, load_target

    target, tokenizer = load_target(model, dtype=cpu_friendly_dtype())
    try:
        # What cannot be is said before a drafter is trained.
        ids = encode(tokenizer, prompt, chat=chat).to(target.device)
        check_lengths(Target(target), [ids[0]], max_new_tokens)
        options = _options(target.generation_config, temperature, top_k, top_p)
        refuse(target._prepare_generation_config(None, **options)[0])
        chosen: Any = (
            pack_linears(Drafter.from_pretrained(drafter, target))
            if drafter
            else _drafter(method, target, tokenizer, model, display, ids)
        )
        if display is not None:
            display.close()
        pieces: list[str] = []

        class Pieces(TextStreamer):  # type: ignore[misc]
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                on_text(text)

        results = []

        def decode(model: Any, input_ids: torch.Tensor, **asked: Any) -> torch.Tensor:
            generator = torch.Generator(model.device).manual_seed(seed)
            results.append(generate_as_asked(model, input_ids, chosen, None, generator, **asked)[0])
            return results[0].sequences

        start = perf_counter()
        target.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=decode, max_new_tokens=max_new_tokens,
            streamer=Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True), **options,
        )  # fmt: skip
        seconds = perf_counter() - start
    except ValueError as error:
        raise UsageError(str(error)) from error
    cost = results[0].statistics
    return Written(
        "".join(pieces), len(results[0].new_tokens[0]), seconds, cost.accepted_per_call if cost.target_calls else 1.0
    )


def _options(config: Any, temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """What is given, as options of transformers' `generate`; the model's generation config has the rest."""
    from paperworks.decoding import Sampling

    Sampling(temperature or 0.0, top_k, top_p)
    sampled = bool(config.do_sample) if temperature is None else temperature > 0
    if not sampled:
        if top_k is not None or top_p is not None:
            raise UsageError(
                "top_k and top_p choose what is sampled from, but the text is greedy: give a temperature above 0 too"
            )
        return {"do_sample": False}
    if top_k is None and config.top_k is None:
        # transformers takes the 50 most likely tokens where nobody says how many.
        top_k = 0
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def _drafter(method: str, target: Any, tokenizer: Any, model: str, display: Display | None, prompt: Any) -> Any:
    """The drafter called `method`, as it comes with the package or trained as its recipe trains it.

    None for plain decoding, also where that is faster behind the prompt than a drafter whose tree does not hang on costs.
    """
    from paperworks.decoding import TreeShape
    from paperworks.decoding.costs import drafting_gain
    from paperworks.recipes.decoding.drafting import Drafting, drafter_named, shipped, trained

    if method.lower() == "plain":
        return None
    name, run = drafter_named(method), Run("hydra", display=display)
    if name == "Hydra" and (ready := shipped(run, target, model=model, nodes=None)) is not None:
        return ready
    # The recipes' own parameters make the same key, so that what `paperworks run` trained is used again.
    work = Drafting()
    drafter = trained(
        run, name, target, tokenizer, model=model, tokens=work.train_tokens,
        epochs=work.epochs, vocabulary=work.draft_vocabulary, nodes=None, seed=0,
    )  # fmt: skip
    if isinstance(getattr(drafter, "tree", None), TreeShape) or hasattr(drafter, "nodes"):
        return drafter
    gain = drafting_gain(drafter, target, prompt)
    pays = f"about {gain:.2f} times plain decoding" if gain > 1 else "no drafting pays here: text is written plainly"
    run.log(f"{name} on this machine: {pays}")
    return drafter if gain > 1 else None
