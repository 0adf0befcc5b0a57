"""What only etcd can suffer: TLS and users, several members, pauses, lost answers, another cluster, no space."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from enova_common import certs
from enova_common.errors import Denied, Exhausted, FatalError, InvalidField, RetryableError, TimedOut, Unavailable
from enova_common.identity import Role
from enova_coordinator.store import OUTCOME_UNKNOWN, ModRevisionIs, Put
from enova_coordinator.store.etcd import EtcdSettings, EtcdStore
from enova_testing.etcd_server import EtcdServer, TlsFiles, start_cluster
from enova_testing.store_harness import fill
from enova_testing.store_tools import put, watched
from enova_testing.waiting import until_async

pytestmark = [pytest.mark.etcd, pytest.mark.network]
KEY = "/enova/test/a"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    made = EtcdServer(tmp_path / "etcd")
    made.start()
    yield made
    made.kill()


@pytest.fixture
async def store(server: EtcdServer) -> AsyncIterator[EtcdStore]:
    made = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,), attempt_timeout_s=0.5, call_timeout_s=3.0))
    yield made
    await made.close()


# -- settings, TLS, users -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (EtcdSettings(endpoints=()), "endpoints"),
        (EtcdSettings(endpoints=("http://127.0.0.1:2379",)), "endpoints"),
        (EtcdSettings(endpoints=("127.0.0.1",)), "endpoints"),
        (EtcdSettings(endpoints=("127.0.0.1:2379", "10.0.0.1:2379")), "ca_file"),
        (EtcdSettings(endpoints=("localhost.example.org:2379",)), "ca_file"),
        (EtcdSettings(endpoints=("127.0.0.1:1",), ca_file=Path("/c"), certificate_file=Path("/d")), "certificate_file"),
        (EtcdSettings(endpoints=("127.0.0.1:1",), certificate_file=Path("/c"), key_file=Path("/d")), "ca_file"),
        (EtcdSettings(endpoints=("127.0.0.1:1",), ca_file=Path("/nonexistent")), "ca_file"),
    ],
)
def test_settings_that_cannot_work_or_are_in_the_clear_are_refused(settings: EtcdSettings, field: str) -> None:
    with pytest.raises(InvalidField) as refusal:
        EtcdStore(settings)
    assert (refusal.value.reason, refusal.value.field) == ("INVALID_FIELD", field)


def issued(authority: Path, role: Role, name: str) -> TlsFiles:
    files = certs.issue(authority, role, name, hosts=("127.0.0.1",))
    return TlsFiles(authority / "ca.crt", files.certificate_path, files.key_path)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[EtcdServer, EtcdSettings]]:
    """A server with mutual TLS and users, and the settings of the coordinator's own user."""
    authority = tmp_path / "certs"
    certs.init_authority(authority)
    server = EtcdServer(tmp_path / "etcd", tls=issued(authority, Role.COORDINATOR, "etcd"))
    server.start()
    server.control("user", "add", "root:secret")
    server.control("user", "grant-role", "root", "root")
    server.control("role", "add", "enova")
    server.control("role", "grant-permission", "enova", "--prefix=true", "readwrite", "/enova/")
    server.control("user", "add", "enova:word")
    server.control("user", "grant-role", "enova", "enova")
    server.control("auth", "enable")
    mine = issued(authority, Role.COORDINATOR, "c1")
    yield server, EtcdSettings(
        endpoints=(server.endpoint,),
        ca_file=mine.ca,
        certificate_file=mine.certificate,
        key_file=mine.key,
        username="enova",
        password="word",
        call_timeout_s=3.0,
    )
    server.kill()


async def test_everything_works_over_mutual_tls_with_a_user(secured: tuple[EtcdServer, EtcdSettings]) -> None:
    server, settings = secured
    assert "word" not in repr(settings)
    store = await EtcdStore.open(settings)
    before = await put(store, KEY, b"1")
    async with watched(store, "/enova/test/", before) as watch:
        lease = await store.lease(5)
        await put(store, "/enova/test/leased", b"", lease.id)
        await lease.keepalive()
        await lease.revoke()
        await watch.until(lambda: len(watch.batches) == 2, 5.0, "put and revoke")
        # Tokens do not survive the server: calls, writes and the watch get new ones by themselves.
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        changed = await store.transact([ModRevisionIs(KEY, before)], [Put(KEY, b"2")])
        assert changed.succeeded
        await watch.until_key(KEY, 10.0)
    await store.close()


async def test_key_outside_the_grant_is_denied_with_the_remedy(secured: tuple[EtcdServer, EtcdSettings]) -> None:
    store = await EtcdStore.open(secured[1])
    with pytest.raises(Denied, match="grant"):
        await store.transact([ModRevisionIs("/other", 0)], [Put("/other", b"")])
    async with watched(store, "/other/", 1) as watch:
        await watch.until_error(10.0)
    assert isinstance(watch.error, Denied)
    await store.close()


async def test_wrong_password_names_the_field(secured: tuple[EtcdServer, EtcdSettings]) -> None:
    with pytest.raises(Denied) as refusal:
        await EtcdStore.open(replace(secured[1], password="wrong"))
    assert (refusal.value.field, refusal.value.reason) == ("username", "STORE_DENIED")


async def test_no_user_where_users_are_needed_is_denied(secured: tuple[EtcdServer, EtcdSettings]) -> None:
    with pytest.raises(Denied):
        await EtcdStore.open(replace(secured[1], username="", password=""))


async def test_strangers_certificates_do_not_connect(
    secured: tuple[EtcdServer, EtcdSettings], tmp_path: Path
) -> None:
    certs.init_authority(tmp_path / "stranger")
    stranger = issued(tmp_path / "stranger", Role.COORDINATOR, "c1")
    settings = replace(secured[1], call_timeout_s=1.0)
    without = replace(settings, certificate_file=None, key_file=None)
    theirs = replace(settings, certificate_file=stranger.certificate, key_file=stranger.key)
    distrusting = replace(settings, ca_file=stranger.ca)
    for wrong in (without, theirs, distrusting):
        with pytest.raises(RetryableError):
            await EtcdStore.open(wrong)


def test_own_certificate_that_is_no_good_is_named(tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    with pytest.raises(certs.BadCertificate, match=str(junk)):
        EtcdStore(EtcdSettings(endpoints=("127.0.0.1:1",), ca_file=junk, certificate_file=junk, key_file=junk))


# -- members that are away ----------------------------------------------------------------------------------------


async def test_store_that_is_away_is_unavailable_and_comes_back(server: EtcdServer, store: EtcdStore) -> None:
    await put(store, KEY, b"1")
    await asyncio.to_thread(server.stop)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="no etcd can be reached") as refusal:
        await store.get(KEY)
    assert time.monotonic() - began < 5.0
    assert refusal.value.remedy
    with pytest.raises(Unavailable):  # nothing was sent, so nothing is unknown
        await store.transact([ModRevisionIs(KEY, 0)], [Put(KEY, b"2")])
    await asyncio.to_thread(server.start)
    entry = await store.get(KEY)
    assert entry is not None
    assert entry.value == b"1"


async def test_members_that_refuse_or_hang_are_passed_over(server: EtcdServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [listener.getsockname()[1] for listener in (silent, gone)]
        gone.close()
        endpoints = (*(f"127.0.0.1:{port}" for port in ports), server.endpoint)
        store = await EtcdStore.open(EtcdSettings(endpoints=endpoints))
        began = time.monotonic()
        await put(store, KEY, b"1")
        assert time.monotonic() - began < 1.0, "the member that answered is asked first from then on"
        await store.close()


async def test_write_without_an_answer_is_of_unknown_outcome(server: EtcdServer, store: EtcdStore) -> None:
    created = await put(store, KEY, b"1")
    server.pause()
    with pytest.raises(TimedOut) as unknown:
        await store.transact([ModRevisionIs(KEY, created)], [Put(KEY, b"2")])
    assert unknown.value.reason == OUTCOME_UNKNOWN
    with pytest.raises(RetryableError):
        await store.get(KEY)
    server.resume()
    entry = await store.get(KEY)
    assert entry is not None
    assert entry.value in (b"1", b"2")


async def test_watch_goes_on_by_itself_over_restarts(server: EtcdServer, store: EtcdStore) -> None:
    before = await put(store, KEY, b"")
    async with watched(store, "/enova/test/", before) as watch:
        for number in range(3):
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await put(store, KEY, b"%d" % number)
        await watch.until(lambda: len(watch.batches) == 3, 10.0, "three changes")
        assert watch.error is None
    assert [told[2] for told in watch.told()] == [b"0", b"1", b"2"]


async def test_quiet_watch_keeps_up_with_compaction(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, arguments=["--experimental-watch-progress-notify-interval=100ms"])
    server.start()
    store = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    before = await put(store, KEY, b"")
    async with watched(store, KEY, before) as watch:
        for number in range(10):
            newest = await put(store, "/enova/other", b"%d" % number)
        # Two more notifications after the last write; their only sign from outside is what follows.
        await asyncio.sleep(0.4)
        await store.compact(newest)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await put(store, KEY, b"end")
        await watch.until_key(KEY, 10.0)
    assert watch.error is None
    await store.close()
    server.kill()


async def test_killing_the_leader_of_etcd_loses_and_doubles_nothing(cluster: list[EtcdServer], seed: int) -> None:
    draw = random.Random(seed)
    store = await EtcdStore.open(EtcdSettings(endpoints=tuple(member.endpoint for member in cluster)))
    before = await put(store, KEY, b"")
    acknowledged: list[int] = []
    stop = asyncio.Event()

    async def write() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            with contextlib.suppress(RetryableError):  # of unknown outcome: it may be there once, or not
                entry = await store.get(KEY)
                assert entry is not None
                guard = ModRevisionIs(KEY, entry.mod_revision)
                if (await store.transact([guard], [Put(KEY, b"%d" % number)])).succeeded:
                    acknowledged.append(number)

    async with watched(store, "/enova/test/", before) as watch:
        writing = asyncio.create_task(write())
        for _ in range(3):
            leader = await asyncio.to_thread(leader_of, cluster)
            await asyncio.sleep(draw.uniform(0.05, 0.3))
            await asyncio.to_thread(leader.kill)
            began = time.monotonic()
            served = len(acknowledged)
            await until_async(lambda served=served: len(acknowledged) > served + 20, timeout_s=20.0)  # type: ignore[misc]
            assert time.monotonic() - began < 10.0
            await asyncio.to_thread(leader.start)
        stop.set()
        await writing
        end = await put(store, KEY, b"-1")
        await watch.until(lambda: watch.batches[-1].revision >= end, 15.0, f"the end at {end}")
    told = [int(value) for _, _, value in watch.told() if value is not None]
    assert len(told) == len(set(told)), "nothing happened twice, or was told twice"
    assert set(acknowledged) <= set(told)
    assert told[:-1] == sorted(told[:-1])
    await store.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[EtcdServer]]:
    """Three members."""
    members = start_cluster(tmp_path)
    yield members
    for member in members:
        member.kill()


def leader_of(members: list[EtcdServer]) -> EtcdServer:
    """The member that leads, by etcd's own word."""
    for member in members:
        status = json.loads(member.control("endpoint", "status", "--write-out=json"))[0]["Status"]
        if status["header"]["member_id"] == status["leader"]:
            return member
    raise AssertionError("no member leads")


# -- another cluster, no space, the end ---------------------------------------------------------------------------


async def test_another_cluster_at_the_same_address_is_refused(server: EtcdServer, store: EtcdStore) -> None:
    await put(store, KEY, b"1")
    await asyncio.to_thread(server.kill)
    shutil.rmtree(server.data)
    server.peer = server.peer.replace("127.0.0.1", "localhost")  # of which etcd makes the cluster's number
    await asyncio.to_thread(server.start)
    with pytest.raises(FatalError) as refusal:
        await store.get(KEY)
    assert refusal.value.reason == "STORE_REPLACED"


async def test_full_etcd_is_repaired_as_documented(tmp_path: Path) -> None:
    server = EtcdServer(tmp_path, quota_bytes=16 << 20)
    server.start()
    store = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    lease = await store.lease(60)
    await fill(store, "/enova/test/")
    with pytest.raises(Exhausted):
        await store.lease(60)
    await lease.keepalive()
    # The steps of docs/store-operations.md.
    server.control("alarm", "disarm")
    server.control("del", "--prefix", "/enova/test-filler/")
    revision = json.loads(server.control("endpoint", "status", "--write-out=json"))[0]["Status"]["header"]["revision"]
    server.control("compact", str(revision))
    server.control("defrag")
    server.control("alarm", "disarm")
    await put(store, KEY, b"1")
    await store.close()
    server.kill()


async def test_entries_are_readable_with_etcdctl(server: EtcdServer, store: EtcdStore) -> None:
    await put(store, KEY, b'{"kind":"node","version":1}')
    assert server.control("get", "--prefix", "/enova/") == f'{KEY}\n{{"kind":"node","version":1}}\n'


async def test_closed_store_says_so_and_ends_its_watches(server: EtcdServer) -> None:
    store = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    before = await put(store, KEY, b"")
    batches = store.watch("/enova/test/", after=before)
    waiting = asyncio.ensure_future(anext(batches, None))
    await put(store, KEY, b"1")
    assert await waiting is not None
    waiting = asyncio.ensure_future(anext(batches, None))
    await asyncio.sleep(0.05)  # so that the watch waits; whether it already does changes nothing else
    await store.close()
    assert await asyncio.wait_for(waiting, 5.0) is None
    with pytest.raises(Unavailable) as refusal:
        await store.get(KEY)
    assert refusal.value.reason == "STORE_CLOSED"
