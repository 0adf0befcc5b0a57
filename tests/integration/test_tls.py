"""Mutual TLS with real certificates: who gets in, who does not, and that the reason is said."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from enova_common import certs, rpc
from enova_common.errors import AlreadyExists, CallerError, Denied, InvalidField, NotFound, Unavailable
from enova_common.identity import Identity, Role
from enova_common.settings import TlsSettings

pytestmark = pytest.mark.network

DAY_S = 86_400.0


def tls_of(directory: Path, role: Role, name: str, hosts: tuple[str, ...] = ()) -> TlsSettings:
    issued = certs.issue(directory, role, name, hosts=hosts)
    return TlsSettings(ca=directory / "ca.crt", cert=issued.certificate_path, key=issued.key_path)


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    certs.init_authority(tmp_path / "certs")
    return tmp_path / "certs"


async def who(_request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    peer = rpc.peer_identity(context)
    peer.require(Role.AGENT, Role.USER)
    return str(peer.identity).encode()


class Who(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(who)


async def ask(address: str, tls: TlsSettings | None) -> str:
    async with rpc.open_channel(address, tls) as channel:
        try:
            method: Any = channel.unary_unary("/test/who")
            answer: bytes = await method(b"", timeout=10)
        except grpc.RpcError as error:
            raise rpc.error_from_rpc(error) from error
        return answer.decode()


@pytest.fixture
async def server(authority: Path) -> AsyncIterator[str]:
    running = rpc.create_server()
    running.add_generic_rpc_handlers((Who(),))
    address = rpc.listen(running, "127.0.0.1:0", tls_of(authority, Role.COORDINATOR, "c1"))
    await running.start()
    yield address
    await running.stop(0)


async def test_the_server_knows_the_peer_by_its_certificate(server: str, authority: Path) -> None:
    assert await ask(server, tls_of(authority, Role.AGENT, "gpu-1")) == "agent/gpu-1"
    assert await ask(server, tls_of(authority, Role.USER, "ada")) == "user/ada"


async def test_a_role_that_may_not_is_denied(server: str, authority: Path) -> None:
    with pytest.raises(Denied) as raised:
        await ask(server, tls_of(authority, Role.ETCD, "e1"))
    assert raised.value.reason == "WRONG_ROLE"


async def test_a_certificate_of_another_authority_does_not_get_in(server: str, authority: Path, tmp_path: Path) -> None:
    certs.init_authority(tmp_path / "other")
    stranger = tls_of(tmp_path / "other", Role.AGENT, "gpu-1")
    trusting = TlsSettings(ca=authority / "ca.crt", cert=stranger.cert, key=stranger.key)
    with pytest.raises(CallerError, match="was not issued by the authority"):
        await ask(server, trusting)  # told before anything is sent
    mixed = tmp_path / "mixed.crt"  # the stranger trusts both, so only the server can refuse it
    mixed.write_bytes((authority / "ca.crt").read_bytes() + (tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(Unavailable):
        await ask(server, TlsSettings(ca=mixed, cert=stranger.cert, key=stranger.key))
    assert await ask(server, tls_of(authority, Role.AGENT, "gpu-1")) == "agent/gpu-1"


async def test_a_server_of_another_authority_is_not_trusted(server: str, tmp_path: Path) -> None:
    certs.init_authority(tmp_path / "other")
    with pytest.raises(Unavailable) as raised:
        await ask(server, tls_of(tmp_path / "other", Role.AGENT, "gpu-1"))
    assert raised.value.reason == "TLS_FAILED"
    assert "certificates" in raised.value.remedy


async def test_a_server_under_a_name_that_is_not_its_own_is_not_trusted(authority: Path) -> None:
    """An agent's certificate serves nowhere, so that a broken-in host cannot pose as a coordinator."""
    running = rpc.create_server()
    running.add_generic_rpc_handlers((Who(),))
    address = rpc.listen(running, "127.0.0.1:0", tls_of(authority, Role.AGENT, "gpu-1"))
    await running.start()
    with pytest.raises(Unavailable):
        await ask(address, tls_of(authority, Role.USER, "ada"))
    await running.stop(0)


async def test_a_client_without_a_certificate_or_without_tls_does_not_get_in(server: str, authority: Path) -> None:
    credentials = grpc.ssl_channel_credentials((authority / "ca.crt").read_bytes())
    async with grpc.aio.secure_channel(server, credentials) as channel:
        method: Any = channel.unary_unary("/test/who")
        with pytest.raises(grpc.aio.AioRpcError):
            await method(b"", timeout=5)
    with pytest.raises(Unavailable):
        await ask(server, None)


async def test_plaintext_on_the_loopback_is_a_peer_without_an_identity() -> None:
    running = rpc.create_server()
    running.add_generic_rpc_handlers((Who(),))
    address = rpc.listen(running, "127.0.0.1:0")
    await running.start()
    assert await ask(address, None) == "None"
    await running.stop(0)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "10.0.0.1:7400", "[::]:0", "gpu-host-1:7400", "localhost.evil.org:1"])
async def test_plaintext_off_the_loopback_is_refused_with_what_to_do(address: str) -> None:
    for act in (rpc.open_channel, lambda it: rpc.listen(rpc.create_server(), it)):
        with pytest.raises(CallerError) as raised:
            act(address)
        assert (raised.value.reason, raised.value.field) == ("PLAINTEXT_REFUSED", "tls")
        assert "enova certs issue" in raised.value.remedy


async def test_a_renewed_certificate_is_used_by_the_next_channel(server: str, authority: Path) -> None:
    files = tls_of(authority, Role.AGENT, "gpu-1")
    before = files.cert.read_bytes()
    certs.issue(authority, Role.AGENT, "gpu-1", days=30)
    assert files.cert.read_bytes() != before
    assert await ask(server, files) == "agent/gpu-1"


def test_each_flaw_of_a_certificate_is_told(authority: Path, tmp_path: Path) -> None:
    files = tls_of(authority, Role.AGENT, "gpu-1", ("10.0.0.5",))
    other = tls_of(authority, Role.AGENT, "gpu-2")
    now = time.time()
    certs.init_authority(tmp_path / "other")
    (tmp_path / "garbage").write_text("nonsense")

    def flaw(at: float = now, **changes: Path) -> str:
        values = {"ca": files.ca, "cert": files.cert, "key": files.key} | changes
        with pytest.raises(CallerError) as raised:
            certs.check_tls(TlsSettings(**values), at)
        assert str(changes.get("cert", "")) in raised.value.message
        assert raised.value.remedy
        return raised.value.metadata["why"]

    assert flaw(now + 91 * DAY_S) == "EXPIRED"
    assert flaw(now - DAY_S) == "NOT_YET_VALID"
    assert flaw(ca=tmp_path / "other" / "ca.crt") == "WRONG_AUTHORITY"
    assert flaw(key=other.key) == "KEY_MISMATCH"
    assert flaw(cert=tmp_path / "garbage") == "UNREADABLE"
    assert flaw(cert=tmp_path / "absent") == "UNREADABLE"
    assert flaw(key=files.cert) == "UNREADABLE"
    assert flaw(cert=files.ca, key=authority / "ca.key") == "NO_IDENTITY"
    files.key.chmod(0o644)
    assert flaw() == "KEY_EXPOSED"
    files.key.chmod(0o600)
    facts = certs.check_tls(files, now)
    assert facts.identity == Identity(Role.AGENT, "gpu-1")
    assert facts.hosts == ("10.0.0.5",)


def test_keys_are_written_for_the_owner_alone(authority: Path) -> None:
    previous = os.umask(0)
    try:
        files = tls_of(authority, Role.USER, "ada")
    finally:
        os.umask(previous)
    assert files.key.stat().st_mode & 0o777 == 0o600
    assert (authority / "ca.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in authority.iterdir()) == ["ca.crt", "ca.key", "user-ada.crt", "user-ada.key"]


def test_an_authority_is_never_overwritten_and_must_exist(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(AlreadyExists, match="exists"):
        certs.init_authority(authority)
    with pytest.raises(NotFound, match="no authority"):
        certs.issue(tmp_path / "empty", Role.USER, "ada")


@pytest.mark.parametrize(
    ("name", "hosts", "days", "field"),
    [
        ("Ada", (), 90, "name"),
        ("../x", (), 90, "name"),
        ("ada", ("host:7400",), 90, "host"),
        ("ada", ("",), 90, "host"),
        ("ada", (), 0, "days"),
        ("ada", (), 4000, "days"),
    ],
)
def test_what_cannot_be_issued_names_the_field(
    authority: Path, name: str, hosts: tuple[str, ...], days: int, field: str
) -> None:
    with pytest.raises(InvalidField) as raised:
        certs.issue(authority, Role.AGENT, name, hosts=hosts, days=days)
    assert (raised.value.reason, raised.value.field) == ("INVALID_FIELD", field)
