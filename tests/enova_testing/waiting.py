"""Waiting for the world with a deadline, in place of sleeps of a guessed length."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

POLL_S = 0.02  # fine enough not to be felt in a test, coarse enough not to load two cores


def until(
    condition: Callable[[], object], *, timeout_s: float = 10.0, what: str | Callable[[], str] = ""
) -> object:
    """Return the first truthy value of `condition`; fail after `timeout_s` with `what`, or with what that says then."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {timeout_s} s: {told or inspect.getsource(condition).strip()}")
        time.sleep(POLL_S)


async def until_async(
    condition: Callable[[], object | Awaitable[object]], *, timeout_s: float = 10.0, what: str = ""
) -> object:
    """`until` for a coroutine or a plain function, on the running loop."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or inspect.getsource(condition).strip()}")
        await asyncio.sleep(POLL_S)
