"""What visitors see of a run: its error, traceback and log without the paths of the server.

The store keeps them as they were, for `paperworks results ID` on the machine itself.
"""

from __future__ import annotations

import re
from copy import copy
from dataclasses import replace
from pathlib import Path

from paperworks.lab.run import Run

_CUT = "…"
# A file in an address of its own kind: sqlite:////home/…, file:///home/….
_FILE_ADDRESS = re.compile(r"\b(sqlite|file):/{2,}")
_WITH_PASSWORD = re.compile(r"\b([a-z][a-z0-9+]*)://[^\s/@'\"]+@[^\s'\",;)]+")
# In quotes a path may hold blanks.
_QUOTED = re.compile(r"""(['"])(?:…|~\w*)?/(?:[^'"\n/]*/)+([^'"\n/]*)\1""")
# Two slashes are one, but behind the scheme of an address.
_PLAIN = re.compile(
    r"""(?:(?<![\w/.~-])|(?<=\\n)|(?<=\s-[A-Za-z]))(?:…|~\w*)?(?:(?<!:)/+|/)"""
    r"""(?:[^\s'"`,;:()\[\]{}<>|/]+/+)+([^\s'"`,;:()\[\]{}<>|/]*)"""
)
_HOMES = re.compile(r"(?:(?<![\w/.~-])|(?<=\\n))/(?:home|Users)/[^\s'\"`,;:()\[\]{}<>|/]+")


def without_paths(text: str) -> str:
    """Text in which of each absolute path only the last part stays, and of an address with a password its kind.

    Example:
        >>> without_paths('File "/home/ada/my models/run.py", line 3: no /srv/data/iris.csv; see https://example.org/a/b')
        'File "…/run.py", line 3: no …/iris.csv; see https://example.org/a/b'
        >>> without_paths("postgresql+psycopg://ada:secret@db/papers, sqlite:////srv/store/runs.db")
        'postgresql+psycopg://…, sqlite:…/runs.db'
    """
    text = _WITH_PASSWORD.sub(rf"\1://{_CUT}", text)
    text = _FILE_ADDRESS.sub(r"\1:/", text)
    # First what may have blanks in it, and whose last part may be a name of somebody.
    text = _HOMES.sub(_CUT, text.replace(str(Path.home()), _CUT) if Path.home() != Path("/") else text)
    text = _QUOTED.sub(rf"\1{_CUT}/\2\1", text)
    return _PLAIN.sub(rf"{_CUT}/\1", text)


def for_visitors(run: Run) -> Run:
    """A run as visitors see it; the run itself stays as it is."""
    shown = copy(run)
    shown.parameters = {
        name: without_paths(value) if isinstance(value, str) else value for name, value in run.parameters.items()
    }
    shown.error = None if run.error is None else without_paths(run.error)
    shown.traceback = None if run.traceback is None else without_paths(run.traceback)
    shown.logs = [replace(log, message=without_paths(log.message)) for log in run.logs]
    shown.bars = tuple(replace(bar, description=without_paths(bar.description)) for bar in run.bars)
    shown.measurements = [
        replace(
            measurement,
            name=without_paths(measurement.name),
            series=None if measurement.series is None else without_paths(measurement.series),
            against=None if measurement.against is None else without_paths(measurement.against),
        )
        for measurement in run.measurements
    ]
    return shown
