"""Reading a request's body: whole, within a size and a time."""

from __future__ import annotations

import asyncio

from aiohttp import web

from enova_agent.core.openai_errors import body_too_large, body_too_slow
from enova_agent.ingress.calls import Rejected


async def read_body(request: web.BaseRequest, *, limit_bytes: int, limit_s: float) -> bytes:
    """The body. Raises Rejected if it is too large or too slow."""
    if (request.content_length or 0) > limit_bytes:
        raise Rejected(body_too_large(limit_bytes))
    try:
        async with asyncio.timeout(limit_s):
            if request.headers.get("expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                request.writer.output_size = 0  # the answer itself has not begun
            return await request.read()
    except TimeoutError as error:
        raise Rejected(body_too_slow(limit_s)) from error
    except web.HTTPRequestEntityTooLarge as error:
        raise Rejected(body_too_large(limit_bytes)) from error
