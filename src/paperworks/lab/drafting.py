"""What recipes of the decoding room share: prompts as token ids, and drafters trained alike and kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks import __version__
from paperworks.errors import UsageError
from paperworks.lab.cache import cached_folder
from paperworks.lab.run import Run

if TYPE_CHECKING:
    import torch

    from paperworks.decoding import Drafter


def cpu_friendly_dtype() -> torch.dtype:
    """bfloat16 where the processor or GPU multiplies it in hardware, else float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def prompt_ids(model: str, prompts: str, count: int, *, dtype: torch.dtype) -> tuple[Any, Any, list[torch.Tensor]]:
    """The model, its tokenizer, and `count` prompts as (1, length) token ids through its chat template, evenly spread over their set.

    Raises:
        UsageError: There are not so many prompts.
    """
    import torch

    from paperworks.lab.hub import load_model
    from paperworks.lab.hub import prompts as load_prompts

    device = "cuda" if torch.cuda.is_available() else "cpu"
    target, tokenizer = load_model(model, dtype=dtype, device=device)
    texts = load_prompts(prompts)
    if not 1 <= count <= len(texts):
        raise UsageError(
            f"{prompts} has {len(texts)} prompts, so {count} of them cannot be taken: give 1 to {len(texts)}"
        )
    ids = []
    for text in texts[:: len(texts) // count][:count]:
        if getattr(tokenizer, "chat_template", None):
            encoded = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            row = tokenizer.encode(encoded, add_special_tokens=False)
        else:
            row = tokenizer.encode(text)
        ids.append(torch.tensor([row], device=device))
    return target, tokenizer, ids


def drafting_data(run: Run, target: Any, tokenizer: Any, *, model: str, tokens: int, seed: int) -> Path:
    """File of the text that the target wrote itself, with its hidden states; the same for every drafter."""

    def build(folder: Path) -> None:
        import torch

        from paperworks.decoding import collect, self_written

        generator = torch.Generator(target.device).manual_seed(seed)
        batch = max(1, min(64, tokens // 128))
        with run.progress(tokens, "the target writes its training text") as bar:
            written = self_written(
                target, tokenizer, tokens=tokens, batch_size=batch, generator=generator, progress=bar.advance
            )
        with run.progress(len(written), "reading it for hidden states") as bar:
            collect(target, written, progress=bar.advance).save(folder / "data.safetensors")

    key = {
        "model": _identity(model, target), "tokens": tokens, "seed": seed, "version": __version__
    }  # fmt: skip
    return cached_folder("drafting-data", key, build) / "data.safetensors"


def trained(
    run: Run,
    name: str,
    kind: type[Drafter],
    options: dict[str, Any],
    target: Any,
    tokenizer: Any,
    *,
    model: str,
    tokens: int,
    epochs: float,
    vocabulary: int,
    nodes: int,
    seed: int,
) -> Drafter:
    """A drafter trained on the common data, its tree fitted to what held-out text accepts; kept between runs."""

    def build(folder: Path) -> None:
        import torch

        from paperworks.decoding import DraftingData, fit_tree, train_drafter

        data = DraftingData.load(drafting_data(run, target, tokenizer, model=model, tokens=tokens, seed=seed))
        train, held_out = data.split(max(1, len(data) // 10))
        words = train.frequent_tokens(min(vocabulary, target.config.vocab_size)) if vocabulary else None
        torch.manual_seed(seed)
        drafter = kind.from_target(target, vocabulary=words, **options)  # type: ignore[attr-defined]
        batch = 4
        with run.progress(max(1, round(epochs * len(train) / batch)), f"training {name}") as bar:
            train_drafter(
                drafter, target, train, epochs=epochs, batch_size=batch,
                generator=torch.Generator().manual_seed(seed), progress=bar.advance,
            )  # fmt: skip
        fit_tree(drafter, target, held_out, nodes=nodes)
        drafter.save_pretrained(folder)

    key = {
        "model": _identity(model, target), "kind": kind.__name__, "options": options, "tokens": tokens,
        "epochs": epochs, "vocabulary": vocabulary, "nodes": nodes, "seed": seed, "version": __version__,
    }  # fmt: skip
    return kind.from_pretrained(cached_folder("drafters", key, build), target)


def _identity(model: str, target: Any) -> dict[str, Any]:
    """What tells this model from another of the same name: type, size and a sum over its weights."""
    weight = target.get_output_embeddings().weight.detach()
    return {
        "name": Path(model).name,
        "parameters": sum(parameter.numel() for parameter in target.parameters()),
        "dtype": str(target.dtype),
        "head": float(weight[:: max(1, len(weight) // 64)].double().sum()),
    }
