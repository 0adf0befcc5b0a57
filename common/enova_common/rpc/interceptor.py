"""The server's interceptor: errors become statuses, every unary call gets a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from enova_common.errors import EnovaError, FatalError, TimedOut
from enova_common.rpc.status import DETAILS_KEY, grpc_code, status_from_error

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 30.0
_INTERNAL = FatalError(
    "internal error", reason="INTERNAL", remedy="the server's log has the details; report it if it comes again"
)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps what a method raises, on all four kinds of methods.

    An EnovaError becomes its status. Anything else is a defect: it is logged whole, and the caller gets a fixed text,
    since an exception's text may hold what the caller must not see. Where the caller of a unary method set no
    deadline, `default_timeout_s` is one: nobody waits forever for an answer that nobody expects any more.
    """

    def __init__(self, *, default_timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._default_timeout_s = default_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the method, wrapped."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._one(handler.unary_unary, method), **codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(
                self._one(handler.stream_unary, method, streams=True), **codec
            )
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._many(handler.unary_stream, method), **codec)
        return grpc.stream_stream_rpc_method_handler(self._many(handler.stream_stream, method), **codec)

    def _one(self, behavior: Callable[..., Awaitable[Any]], method: str, *, streams: bool = False) -> Any:
        """A method with one answer; a stream of requests may last, so only a unary call has a deadline."""

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async with _mapped_errors(context, method):
                if streams or context.time_remaining() is not None:
                    return await behavior(request, context)
                return await self._within_default(behavior(request, context), method)

        return answer

    def _many(self, behavior: Callable[..., Any], method: str) -> Any:
        """A method with a stream of answers, written as a generator or by context.write."""

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            async with _mapped_errors(context, method):
                result = behavior(request, context)
                if not hasattr(result, "__aiter__"):
                    await result
                    return
                async with contextlib.aclosing(result):
                    async for message in result:
                        await context.write(message)

        return answer

    async def _within_default(self, call: Awaitable[Any], method: str) -> Any:
        try:
            async with asyncio.timeout(self._default_timeout_s) as timeout:
                return await call
        except TimeoutError as error:
            if not timeout.expired():
                raise  # the method's own, and not a deadline of ours
            raise TimedOut(f"{method} took longer than {self._default_timeout_s:g} s") from error


@contextlib.asynccontextmanager
async def _mapped_errors(context: grpc.aio.ServicerContext[Any, Any], method: str) -> AsyncIterator[None]:
    try:
        yield
    except EnovaError as error:
        if isinstance(error, FatalError):
            log.exception("%s failed", method)
        await _abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise  # the method itself ended the call; or gRPC is used wrongly, which gRPC reports
    except Exception:
        log.exception("%s failed", method)
        await _abort(context, _INTERNAL)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: EnovaError) -> NoReturn:
    status = status_from_error(error)
    details = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(grpc_code(error), status.message, details)
    raise AssertionError("abort returned")
