"""Secrets that are handed out once, and what is kept of them."""

from __future__ import annotations

import hashlib
import secrets


def new_token() -> str:
    """A random token of 256 bits, safe in a URL and in a cookie.

    Example:
        >>> len(new_token()), new_token() == new_token()
        (43, False)
    """
    return secrets.token_urlsafe(32)


def hashed(token: str) -> str:
    """What is kept of a token, from which nobody gets it back; as random as it is, it needs no salt.

    Example:
        >>> len(hashed(new_token()))
        64
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
