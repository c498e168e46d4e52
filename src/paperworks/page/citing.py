"""Citations in BibTeX, from titles and names that anybody may have written."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

from paperworks.page.entries import Entry

# BibTeX counts braces even behind a backslash, so none may stay; a quote in braces ends no value.
_BIBTEX = str.maketrans(
    {char: f"\\{char}" for char in "&%#_$"}
    | {"{": r"\textbraceleft{}", "}": r"\textbraceright{}", "\\": r"\textbackslash{}", '"': '{"}'}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}"}
)
# What mathematics in a title is made of; all else that TeX knows could read files or redefine what follows.
_COMMANDS = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi varpi rho sigma tau
upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar infty partial
nabla sum prod int sqrt frac dfrac tfrac binom mathcal mathbb mathbf mathrm mathit mathsf mathtt mathfrak text textbf
textit textrm textsc operatorname left right big Big hat bar tilde vec dot ddot overline underline widehat widetilde
times cdot pm mp le leq ge geq ne neq ll gg approx sim simeq equiv propto in notin subset subseteq cup cap to
rightarrow leftarrow Rightarrow leftrightarrow mapsto langle rangle lfloor rfloor lceil rceil ldots cdots dots log exp
min max sup inf lim circ star ast oplus otimes mid forall exists neg quad prime dagger top perp
"""


def bibtex(entry: Entry) -> str:
    """How to cite a paper.

    Example:
        >>> from datetime import UTC, datetime
        >>> entry = Entry(key="2402.05109", title="Hydra", authors=("Zack Ankner",), published=datetime(2024, 2, 7, tzinfo=UTC))
        >>> print(bibtex(entry))
        @misc{ankner2024hydra,
          title = {{Hydra}},
          author = {Zack Ankner},
          year = {2024},
          eprint = {2402.05109},
          archivePrefix = {arXiv},
          url = {https://arxiv.org/abs/2402.05109},
        }
        <BLANKLINE>
    """
    surname = entry.authors[0].split()[-1] if entry.authors else ""
    word = next(iter(re.findall(r"\w{4,}", entry.title)), entry.title)
    plain = unicodedata.normalize("NFKD", f"{surname}{entry.year}{word}").encode("ascii", "ignore").decode().lower()
    values = {
        "title": f"{{{_latex(entry.title)}}}",
        "author": " and ".join(map(_name, entry.authors)),
        "year": str(entry.year),
        "eprint": "" if entry.key.startswith("card:") else entry.key,
        "archivePrefix": "" if entry.key.startswith("card:") else "arXiv",
        "url": quote(entry.url, safe=":/?#[]@!$&'()*+,;=%~"),
    }
    lines = [f"  {name} = {{{value}}}," for name, value in values.items() if value]
    return "\n".join([f"@misc{{{re.sub(r'[^a-z0-9]', '', plain) or 'paper'},", *lines, "}\n"])


def _name(author: str) -> str:
    """A name for BibTeX, which reads commas and the words "and" and "others" as its own unless braces are around them."""
    name = _latex(author)
    return f"{{{name}}}" if re.search(r",|\b(and|others)\b", author, re.IGNORECASE) else name


def _latex(source: str) -> str:
    """Text for LaTeX, in one line and all of it escaped; mathematics of known commands stays as it is."""
    pieces = re.split(r"(\$[^$]+\$)", " ".join(source.split()))
    return "".join(
        piece if index % 2 and _harmless(piece) else piece.translate(_BIBTEX) for index, piece in enumerate(pieces)
    )


def _harmless(mathematics: str) -> bool:
    """Whether TeX and BibTeX take it for mathematics alone: braces in pairs, known commands, no other way to write one."""
    depth = 0
    for brace in re.findall(r"[{}]", mathematics):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    commands = re.findall(r"\\([A-Za-z]+|.)", mathematics)
    known = all(command in "|,;:!" or command in _COMMANDS.split() for command in commands)
    return depth == 0 and known and not re.search(r'\^\^|[%#~"&]', mathematics)
