"""The errors that a user can put right, each one clear sentence."""

import re
from pathlib import Path
from traceback import walk_tb

# Modules that bear another name than the package which brings them.
_PACKAGES = {
    "PIL": "pillow",
    "argon2": "argon2-cffi",
    "arviz_stats": "arviz-stats",
    "multipart": "python-multipart",
    "pyro": "pyro-ppl",
    "sklearn": "scikit-learn",
}
# Several extras bring torch: which of them a user wants hangs on what they are at.
_EXTRAS = {
    "page": "page",
    "representation": "analysis",
    "inspection": "analysis",
    "uncertainty": "bayes",
    "tuning": "bayes",
}


class PaperworksError(Exception):
    """Something went wrong that one sentence explains; the command line prints it and exits.

    Example:
        >>> str(PaperworksError("the run failed")), PaperworksError.exit_status
        ('the run failed', 1)
    """

    exit_status = 1


class UsageError(PaperworksError, ValueError):
    """What was asked for cannot be done as asked: an unknown paper, option or place.

    Example:
        >>> isinstance(UsageError("no such paper"), ValueError), UsageError.exit_status
        (True, 2)
    """

    exit_status = 2


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """The sentence that says which extra brings a package that is not installed; None where no extra does.

    Libraries raise this error without a name too, where a part of their own could not be imported.

    Example:
        >>> missing_extra(ModuleNotFoundError(name="fastapi"))
        "fastapi is not installed: pip install 'paperworks[page]'"
        >>> missing_extra(ModuleNotFoundError(name="paperworks.nothing"))
        >>> missing_extra(ModuleNotFoundError("Could not import module 'LlamaForCausalLM'"))
    """
    from importlib.metadata import requires

    if not error.name:
        return None
    module = error.name.partition(".")[0]
    package = _PACKAGES.get(module, module)
    pattern = re.compile(rf"{re.escape(package)}\b(?!-).*; extra == ['\"]([a-z]+)['\"]")
    found = [match[1] for line in requires("paperworks") or () if (match := pattern.match(line))]
    extras = sorted({*found} - {"all", "dev", "docs"}, key=lambda extra: (extra != "llm", extra))
    if not extras:
        return None
    places = [part for frame, _ in walk_tb(error.__traceback__) for part in Path(frame.f_code.co_filename).parts]
    wanted = [extra for place in places for name, extra in _EXTRAS.items() if place.removesuffix(".py") == name]
    extra = next((extra for extra in wanted if extra in extras), extras[0])
    return f"{package} is not installed: pip install 'paperworks[{extra}]'"
