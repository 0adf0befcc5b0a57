"""Who may speak with an ingress, and how."""

from __future__ import annotations

import dataclasses
import ssl
from pathlib import Path

import aiohttp
import pytest

from enova_agent.core.local import EnginesUpdate, RoutesUpdate
from enova_agent.ingress.settings import IngressSettings, ServingTls
from enova_common.certs import init_authority, issue
from enova_common.errors import InvalidField
from enova_common.identity import Role
from enova_common.settings import TlsSettings
from enova_testing.ingress_node import MODEL, IngressNode, engine, replica, route, serve, settle, started
from enova_testing.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.network
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def authority(folder: Path) -> Path:
    path = folder / "certs"
    path.mkdir()
    init_authority(path)
    return path


def fleet_tls(authority: Path, role: Role, name: str) -> TlsSettings:
    files = issue(authority, role, name)
    return TlsSettings(ca=authority / "ca.crt", cert=files.certificate_path, key=files.key_path)


def client_context(files: TlsSettings | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    return context


async def test_ingresses_know_each_other_by_their_certificates(folder: Path, authority: Path) -> None:
    a = IngressNode(folder, node="a", hop_tls=fleet_tls(authority, Role.INGRESS, "a"))
    b = IngressNode(folder, node="b", hop_tls=fleet_tls(authority, Role.INGRESS, "b"))
    async with ScriptedEngine() as upstream, started(a, b), aiohttp.ClientSession() as session:
        await serve([a, b], [(0, b, upstream.url)])
        async with session.post(f"{a.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200
        assert len(upstream.bodies) == 1


async def test_an_entry_sends_nothing_to_a_node_that_is_another_than_routed_to(folder: Path, authority: Path) -> None:
    a = IngressNode(folder, node="a", hop_tls=fleet_tls(authority, Role.INGRESS, "a"))
    impostor = IngressNode(folder, node="b", hop_tls=fleet_tls(authority, Role.INGRESS, "c"))
    async with ScriptedEngine() as upstream, started(a, impostor), aiohttp.ClientSession() as session:
        await serve([a, impostor], [(0, impostor, upstream.url)])
        async with session.post(f"{a.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 503
        assert not upstream.bodies


@pytest.mark.parametrize("role", [Role.AGENT, Role.USER, Role.COORDINATOR])
async def test_another_role_is_refused_at_the_hop(folder: Path, authority: Path, role: Role) -> None:
    node = IngressNode(folder, node="b", hop_tls=fleet_tls(authority, Role.INGRESS, "b"))
    other = fleet_tls(authority, role, "x")
    async with ScriptedEngine() as upstream, started(node), aiohttp.ClientSession() as session:
        await serve([node], [(0, node, upstream.url)])
        async with session.post(
            f"https://{node.hop_address}/enova/hop/v1/chat/completions", json=CHAT,
            headers={"x-enova-replica": replica(0)}, ssl=client_context(other),
        ) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (403, "wrong_role")
        assert not upstream.bodies


async def test_without_a_certificate_of_the_fleet_there_is_no_connection(folder: Path, authority: Path) -> None:
    strangers = folder / "strangers"
    strangers.mkdir()
    init_authority(strangers)
    node = IngressNode(folder, node="b", hop_tls=fleet_tls(authority, Role.INGRESS, "b"))
    async with started(node), aiohttp.ClientSession() as session:
        url = f"{node.hop_address}/enova/hop/v1/chat/completions"
        for files in (None, fleet_tls(strangers, Role.INGRESS, "b")):
            with pytest.raises(aiohttp.ClientError):
                await session.post(f"https://{url}", json=CHAT, ssl=client_context(files))
        with pytest.raises(aiohttp.ClientError):
            await session.post(f"http://{url}", json=CHAT)


async def test_applications_are_served_by_the_operators_certificate(folder: Path, authority: Path) -> None:
    files = issue(authority, Role.INGRESS, "front")
    node = IngressNode(folder, node="a", tls=ServingTls(cert=files.certificate_path, key=files.key_path))
    trust = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    async with ScriptedEngine() as upstream, started(node), aiohttp.ClientSession() as session:
        await serve([node], [(0, node, upstream.url)])
        async with session.post(f"https://{node.address}/v1/chat/completions", json=CHAT, ssl=trust) as answer:
            assert answer.status == 200
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://{node.address}/health")


async def test_an_entry_without_certificates_does_not_speak_to_other_hosts(folder: Path) -> None:
    async with started(node := IngressNode(folder, node="a")), aiohttp.ClientSession() as session:
        there = route([(0, node)])
        target = dataclasses.replace(there.targets[0], hop_address="192.0.2.1:9", replica=replica(9))
        node.agent.say(
            routes=RoutesUpdate(revision=1, routes=(dataclasses.replace(there, targets=(target,)),)),
            engines=EnginesUpdate(engines=(engine(0, "http://127.0.0.1:9"),)),
        )
        await settle(node, revision=1)
        async with session.post(f"{node.url}/chat/completions", json=CHAT) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "no_replica")


@pytest.mark.parametrize(("changes", "field"), [
    ({"listen": "0.0.0.0:1"}, "listen"), ({"hop_listen": "10.0.0.1:1"}, "hop_listen"), ({"listen": "x"}, "listen"),
    ({"metrics_listen": "0.0.0.0:1"}, "metrics_listen"), ({"hop_listen": ":99999"}, "hop_listen"),
    ({"listen": ":80"}, "listen"),
])
def test_plaintext_beyond_the_loopback_is_refused_by_the_settings(changes: dict[str, str], field: str) -> None:
    base = {"socket": Path("s"), "data_dir": Path("d")}
    with pytest.raises(InvalidField) as refused:
        IngressSettings(**base, **changes)  # type: ignore[arg-type]
    assert (refused.value.reason, refused.value.field) == ("INVALID_FIELD", field)


def test_plaintext_to_applications_can_be_asked_for_by_name() -> None:
    settings = IngressSettings(socket=Path("s"), data_dir=Path("d"), listen="0.0.0.0:80", insecure_http=True)
    assert settings.hop_listen.startswith("127.")


async def test_files_that_do_not_belong_together_are_named(folder: Path, authority: Path) -> None:
    one, two = issue(authority, Role.INGRESS, "one"), issue(authority, Role.INGRESS, "two")
    node = IngressNode(folder, node="a", tls=ServingTls(cert=one.certificate_path, key=two.key_path))
    with pytest.raises(InvalidField) as refused:
        await node.start()
    await node.stop()
    assert (refused.value.reason, refused.value.field) == ("INVALID_FIELD", "tls.cert")
