"""How the site reads docstrings: `Example:` holds doctests, which are shown as code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Griffe knows `Examples:` alone; what stands under another name is Markdown, where brackets are links."""

    def on_object(self, *, obj: griffe.Object, **options: Any) -> None:
        """Read the examples of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
