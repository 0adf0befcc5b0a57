"""Real servers and channels on the loopback: errors, deadlines, bounds, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from enova_common import rpc
from enova_common.errors import (
    AlreadyExists,
    CallerError,
    EnovaError,
    Exhausted,
    FatalError,
    InvalidField,
    NotFound,
    TimedOut,
    TooLarge,
    Unavailable,
)

pytestmark = pytest.mark.network

Behavior = Callable[..., Any]
KINDS = ("unary_unary", "stream_unary", "unary_stream", "stream_stream")


@dataclass
class Methods(grpc.GenericRpcHandler):
    """A service of one method of each kind, over bytes, with a given behaviour."""

    behaviors: dict[str, Behavior]

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        kind = handler_call_details.method.rsplit("/", 1)[1]
        if kind not in self.behaviors:
            return None
        return getattr(grpc, f"{kind}_rpc_method_handler")(self.behaviors[kind])


@contextlib.asynccontextmanager
async def serving(**behaviors: Behavior) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server with these methods; `timeout_s` sets its default deadline."""
    timeout_s = behaviors.pop("timeout_s", 30.0)
    server = rpc.create_server(default_timeout_s=timeout_s)  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((Methods(behaviors),))
    address = rpc.listen(server, "127.0.0.1:0")
    await server.start()
    try:
        async with rpc.open_channel(address) as channel:
            yield channel
    finally:
        await server.stop(0)


async def call(channel: grpc.aio.Channel, kind: str, payload: bytes = b"x", **options: Any) -> list[bytes]:
    """The answers of one call of that kind; EnovaError if it failed."""

    async def requests() -> AsyncIterator[bytes]:
        yield payload

    method: Any = getattr(channel, kind)(f"/test/{kind}")
    started = method(requests() if kind.startswith("stream") else payload, **options)
    try:
        if kind.endswith("unary"):
            return [await started]
        return [answer async for answer in started]
    except grpc.RpcError as error:
        raise rpc.error_from_rpc(error) from error


def behavior(kind: str, step: Callable[[], None]) -> Behavior:
    """A method of that kind that runs `step` and then answers b"ok"."""

    async def one(_request: Any, _context: Any) -> bytes:
        step()
        return b"ok"

    async def many(_request: Any, _context: Any) -> AsyncIterator[bytes]:
        yield b"ok"
        step()

    return one if kind.endswith("unary") else many


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_method_answers_through_the_interceptor(kind: str) -> None:
    async with serving(**{kind: behavior(kind, lambda: None)}) as channel:
        assert await call(channel, kind) == [b"ok"]


async def test_a_stream_written_by_context_write_answers_as_well() -> None:
    async def write(_request: bytes, context: Any) -> None:
        await context.write(b"one")
        await context.write(b"two")

    async with serving(unary_stream=write) as channel:
        assert await call(channel, "unary_stream") == [b"one", b"two"]


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_arrives_with_its_kind_reason_field_remedy_and_metadata(kind: str) -> None:
    def fail() -> None:
        raise InvalidField("9 is too many", field="replicas.max", remedy="at most 8", metadata={"limit": "8"})

    async with serving(**{kind: behavior(kind, fail)}) as channel:
        with pytest.raises(InvalidField) as raised:
            await call(channel, kind)
    error = raised.value
    assert (error.reason, error.message, error.field, error.remedy, error.metadata) == (
        "INVALID_FIELD", "9 is too many", "replicas.max", "at most 8", {"limit": "8"},
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_a_defect_is_logged_and_its_text_stays_at_home(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("the password is swordfish")

    async with serving(**{kind: behavior(kind, fail)}) as channel:
        with pytest.raises(FatalError) as raised:
            await call(channel, kind)
    assert raised.value.reason == "INTERNAL"
    assert "swordfish" not in str(raised.value)
    assert "swordfish" in caplog.text


async def test_a_unary_call_without_a_deadline_gets_one() -> None:
    async def hang(_request: bytes, _context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async with serving(unary_unary=hang, timeout_s=0.1) as channel:  # type: ignore[arg-type]
        with pytest.raises(TimedOut, match="/test/unary_unary took longer"):
            await call(channel, "unary_unary")


async def test_the_caller_s_own_deadline_takes_the_place_of_the_default() -> None:
    async def slow(_request: bytes, _context: Any) -> bytes:
        await asyncio.wait([asyncio.ensure_future(asyncio.Event().wait())], timeout=0.3)
        return b"ok"

    async with serving(unary_unary=slow, timeout_s=0.05) as channel:  # type: ignore[arg-type]
        assert await call(channel, "unary_unary", timeout=20) == [b"ok"]
        with pytest.raises(TimedOut):
            await call(channel, "unary_unary", timeout=0.1)


async def test_a_message_over_4_mib_is_refused_and_the_server_still_serves() -> None:
    async with serving(unary_unary=behavior("unary_unary", lambda: None)) as channel:
        with pytest.raises(TooLarge) as raised:
            await call(channel, "unary_unary", bytes(10 << 20))
        assert raised.value.reason == "MESSAGE_TOO_LARGE"
        assert await call(channel, "unary_unary") == [b"ok"]


async def test_the_server_itself_refuses_a_message_over_4_mib() -> None:
    server = rpc.create_server()
    server.add_generic_rpc_handlers((Methods({"unary_unary": behavior("unary_unary", lambda: None)}),))
    address = rpc.listen(server, "127.0.0.1:0")
    await server.start()
    unbounded = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(address, options=unbounded) as channel:
        with pytest.raises(TooLarge):
            await call(channel, "unary_unary", bytes(10 << 20))
        assert await call(channel, "unary_unary") == [b"ok"]
    await server.stop(0)


async def test_calls_over_the_bound_are_refused_and_not_queued() -> None:
    release = asyncio.Event()

    async def wait(_request: bytes, _context: Any) -> bytes:
        await release.wait()
        return b"ok"

    server = rpc.create_server(rpcs_max=3)
    server.add_generic_rpc_handlers((Methods({"unary_unary": wait}),))
    address = rpc.listen(server, "127.0.0.1:0")
    await server.start()
    async with rpc.open_channel(address) as channel:
        calls = [asyncio.ensure_future(call(channel, "unary_unary")) for _ in range(8)]
        refused, _ = await asyncio.wait(calls, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert all(isinstance(done.exception(), Exhausted) for done in refused)
        release.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
    await server.stop(0)
    assert sum(result == [b"ok"] for result in results) >= 3
    assert all(result == [b"ok"] or isinstance(result, Exhausted) for result in results)


async def test_an_unknown_method_and_a_dead_server_are_told_apart() -> None:
    async with serving() as channel:
        with pytest.raises(CallerError) as unknown:
            await call(channel, "unary_unary")
    assert unknown.value.reason == "UNIMPLEMENTED"
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        async with rpc.open_channel(f"127.0.0.1:{closed.getsockname()[1]}") as channel:
            with pytest.raises(Unavailable, match="refused"):
                await call(channel, "unary_unary")


async def test_metadata_too_long_for_trailers_is_cut_and_still_arrives() -> None:
    def fail() -> None:
        raise NotFound("x" * 100_000, metadata={f"key{n}": "y" * 10_000 for n in range(40)}, remedy="z" * 10_000)

    async with serving(unary_unary=behavior("unary_unary", fail)) as channel:
        with pytest.raises(NotFound) as raised:
            await call(channel, "unary_unary")
    assert raised.value.message.endswith("...")


def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    async def listen_twice(address: str) -> None:
        rpc.listen(rpc.create_server(), address)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AlreadyExists) as raised:
            asyncio.run(listen_twice(address))
    assert (raised.value.reason, raised.value.field) == ("ADDRESS_IN_USE", "listen")
    assert address in raised.value.message


async def test_an_address_of_another_host_cannot_be_listened_on(tmp_path: Path) -> None:
    with pytest.raises(EnovaError) as raised:
        rpc.listen(rpc.create_server(), "127.0.0.1:1:2")
    assert raised.value.field == "listen"


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    server = rpc.create_server()
    server.add_generic_rpc_handlers((Methods({"unary_unary": behavior("unary_unary", lambda: None)}),))
    address = rpc.listen(server, f"unix:{tmp_path}/s")
    await server.start()
    async with rpc.open_channel(address) as channel:
        assert await call(channel, "unary_unary") == [b"ok"]
    await server.stop(0)


async def test_health_and_reflection_are_served() -> None:
    server = rpc.create_server()
    servicer = await rpc.add_standard_services(server, ["enova.v1.NodeService"])
    address = rpc.listen(server, "127.0.0.1:0")
    await server.start()
    async with rpc.open_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        check = health_pb2.HealthCheckRequest(service="enova.v1.NodeService")
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
        await servicer.enter_graceful_shutdown()
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        answer = await reflect.read()
        names = {service.name for service in answer.list_services_response.service}
    await server.stop(0)
    assert names == {"enova.v1.NodeService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
