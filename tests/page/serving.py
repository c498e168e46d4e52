"""A page of our own, served by a process of its own, for tests from outside."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from paperworks.page.load import Server, served


def serving(store_url: str, **settings: object) -> AbstractContextManager[Server]:
    """A server over a store, which searches by words only unless it is told otherwise."""
    return served(store_url, **{"meaning": False, **settings})


class Reader(httpx.Client):
    """A reader without a browser: keeps cookies, and takes the token of a form along."""

    def send_form(self, path: str, form: str, **fields: str) -> httpx.Response:
        """Load the page with the form, fill it in and send it."""
        token = re.search(r'name="csrf" value="([^"]+)"', self.get(form).text)
        assert token is not None, f"{form} has no form"
        return self.post(path, data={"csrf": token[1], **fields})

    def token(self) -> str:
        """A token for forms of this reader."""
        found = re.search(r'name="csrf" value="([^"]+)"', self.get("/subscribe").text)
        assert found is not None
        return found[1]


def sqlite(folder: Path) -> str:
    """URL of a store in a folder."""
    return f"sqlite:///{folder}/runs.db"
