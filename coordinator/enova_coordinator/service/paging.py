"""Pages of lists: a token that says after which name the next page begins."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from enova_common.errors import InvalidField

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1000

T = TypeVar("T")


def page_size(wanted: int) -> int:
    """The size to use: 0 is the default, more than the bound is the bound. Raises InvalidField if negative."""
    if wanted < 0:
        raise InvalidField(f"{wanted} is negative", field="page_size", remedy="leave it out for the default")
    return min(wanted or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def encode_token(collection: str, last: str) -> str:
    """The token of the page after `last`."""
    return base64.urlsafe_b64encode(f"{collection}\n{last}".encode()).decode().rstrip("=")


def decode_token(collection: str, token: str) -> str:
    """What the page begins after; "" for the first. Raises InvalidField for a token of another list."""
    if not token:
        return ""
    try:
        text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        text = ""
    kind, separator, last = text.partition("\n")
    if kind != collection or not separator:
        raise InvalidField(
            f"not a token of a list of {collection}", field="page_token", remedy="leave it out to begin anew"
        )
    return last


def page(
    items: Sequence[T], *, collection: str, size: int, token: str, key: Callable[[T], str]
) -> tuple[list[T], str]:
    """One page of items that are sorted by a rising key, and the token of the next ("" = there is none)."""
    size = page_size(size)
    after = decode_token(collection, token)
    rest = [item for item in items if key(item) > after] if after else list(items)
    taken = rest[:size]
    return taken, encode_token(collection, key(taken[-1])) if len(rest) > size else ""
