"""Connections to the members of one etcd: which to ask, how long, with which token, and whether to ask again.

Theory of operation. There is one channel a member, so each member's certificate is checked against its own name,
and one member is preferred until it fails. A call goes out only on a channel that is connected: what fails before
that was never sent. A read that failed is sent again, to the next member, until the call's deadline. A write
that failed after it was sent may have happened: that is `TimedOut` with reason STORE_OUTCOME_UNKNOWN, and the
caller decides. A refused token is renewed once and the call repeated, writes included: etcd checks tokens first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias, TypeVar

import grpc

from enova.etcd import rpc_pb2, rpc_pb2_grpc
from enova_common.backoff import Backoff
from enova_common.errors import Denied, FatalError, RetryableError, TimedOut, Unavailable
from enova_coordinator.store import OUTCOME_UNKNOWN
from enova_coordinator.store.etcd.failures import TokenRefused, translated
from enova_coordinator.store.etcd.settings import EtcdSettings, channel_credentials, check_settings

CONNECT_TIMEOUT_S = 1.0  # to one member, before the next is tried
RETRY = Backoff(initial_s=0.05, maximum_s=0.5, jitter=0.5)
MAX_ANSWER_BYTES = 32 << 20
CHANNEL_OPTIONS = (
    # A frozen member is noticed in 9 s on a quiet watch; etcd refuses pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    # After a restart of the member the next try is not long in coming.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", MAX_ANSWER_BYTES),
    # A proxy that the environment names is for the web, not for the fleet's own store.
    ("grpc.enable_http_proxy", 0),
    # Each store has connections of its own: closing one never touches another.
    ("grpc.use_local_subchannel_pool", 1),
)

Metadata: TypeAlias = tuple[tuple[str, str], ...]
_log = logging.getLogger(__name__)


class _Answer(Protocol):
    @property
    def header(self) -> rpc_pb2.ResponseHeader: ...


_A = TypeVar("_A", bound=_Answer)


class Member:
    """One member of the cluster: its channel and the services on it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.watch = rpc_pb2_grpc.WatchStub(self.channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self.channel)
        self.auth = rpc_pb2_grpc.AuthStub(self.channel)

    async def connected(self, timeout_s: float) -> bool:
        """Whether the channel is, or gets, connected; False at once if the last try failed."""
        try:
            async with asyncio.timeout(timeout_s):
                while (state := self.channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                        return False
                    await self.channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # not in time, or closed meanwhile
            return False
        return True


Send: TypeAlias = Callable[[Member, Metadata, float], Awaitable[_A]]


class Connection:
    """All members of one etcd."""

    def __init__(self, settings: EtcdSettings) -> None:
        check_settings(settings)
        self.settings = settings
        credentials = channel_credentials(settings)
        self._members = [Member(address, credentials) for address in settings.endpoints]
        self._preferred = 0
        self._token: str | None = None
        self._token_lock = asyncio.Lock()
        self._cluster_id = 0
        self.closed = False

    async def close(self) -> None:
        """Close all channels; calls under way fail."""
        self.closed = True
        for member in self._members:
            await member.channel.close()

    async def read(self, send: Send[_A], *, attempt_timeout_s: float | None = None) -> _A:
        """Send until answered or past the deadline; for calls that may be sent twice."""
        deadline = self._now() + self.settings.call_timeout_s
        attempt = 0
        while True:
            member = await self.connected_member(deadline)
            try:
                return await self._send(member, send, deadline, attempt_timeout_s)
            except (Unavailable, TimedOut) as error:
                delay_s = RETRY.delay_s(attempt, random.random())  # noqa: S311 (jitter is no secret)
                if self._now() + delay_s >= deadline or self.closed:
                    raise
                _log.debug("asking etcd again in %.3f s: %s", delay_s, error)
            attempt += 1
            await asyncio.sleep(delay_s)

    async def write(self, send: Send[_A]) -> _A:
        """Send once; raises TimedOut (STORE_OUTCOME_UNKNOWN) where it may have happened without an answer."""
        deadline = self._now() + self.settings.call_timeout_s
        member = await self.connected_member(deadline)
        try:
            return await self._send(member, send, deadline, None)
        except (Unavailable, TimedOut) as error:
            text = f"{error.message}; the write may have happened"
            raise TimedOut(text, reason=OUTCOME_UNKNOWN, remedy="read again, then decide") from error

    async def connected_member(self, deadline: float | None = None) -> Member:
        """The preferred member, or the next that can be reached; Unavailable if none can by the deadline."""
        deadline = self._now() + self.settings.call_timeout_s if deadline is None else deadline
        attempt = 0
        while not self.closed:
            for _ in self._members:
                member = self._members[self._preferred]
                if await member.connected(min(CONNECT_TIMEOUT_S, max(0.0, deadline - self._now()))):
                    return member
                self.avoid(member)
            delay_s = RETRY.delay_s(attempt, random.random())  # noqa: S311 (jitter is no secret)
            if self._now() + delay_s >= deadline:
                names = ", ".join(self.settings.endpoints)
                remedy = "start etcd, or correct the store's endpoints and certificates"
                raise Unavailable(f"no etcd can be reached at {names}", reason="STORE_UNAVAILABLE", remedy=remedy)
            attempt += 1
            await asyncio.sleep(delay_s)
        raise _closed()

    def avoid(self, member: Member) -> None:
        """Prefer the next member, if this one is still the preferred."""
        if self._members[self._preferred] is member:
            self._preferred = (self._preferred + 1) % len(self._members)

    async def metadata(self, member: Member) -> Metadata:
        """The token to send along, fetched where there is none yet."""
        if not self.settings.username:
            return ()
        async with self._token_lock:
            if self._token is None:
                self._token = await self._authenticate(member)
        return (("token", self._token),) if self._token else ()

    def forget_token(self, metadata: Metadata) -> None:
        """Fetch a new token for the next call, unless another call has already."""
        if metadata == (("token", self._token),) or not metadata:
            self._token = None

    @contextmanager
    def errors(self, member: Member) -> Iterator[None]:
        """Turn what gRPC raises into what the Store raises."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise translated(error, member.address) from error
        except asyncio.InvalidStateError as error:
            raise Unavailable(f"etcd at {member.address} ended the call", reason="STORE_UNAVAILABLE") from error
        except (asyncio.CancelledError, grpc.aio.UsageError) as error:
            # Closing a channel cancels its calls, which is not a cancellation of the task that waits for them.
            task = asyncio.current_task()
            if self.closed and (task is None or not task.cancelling()):
                raise _closed() from error
            raise

    def check_cluster(self, header: rpc_pb2.ResponseHeader) -> None:
        """Refuse another etcd than the one first met: its revisions, so also its terms, begin anew."""
        if self._cluster_id == 0:
            self._cluster_id = header.cluster_id
        if header.cluster_id != self._cluster_id:
            text = f"this is another etcd cluster ({header.cluster_id:x}) than before ({self._cluster_id:x})"
            remedy = "correct the endpoints; after a restore see docs/store-operations.md"
            raise FatalError(text, reason="STORE_REPLACED", remedy=remedy)

    async def _send(self, member: Member, send: Send[_A], deadline: float, attempt_timeout_s: float | None) -> _A:
        renewed = False
        while True:
            timeout_s = min(attempt_timeout_s or self.settings.attempt_timeout_s, max(0.001, deadline - self._now()))
            metadata: Metadata = ()
            try:
                metadata = await self.metadata(member)
                with self.errors(member):
                    answer = await send(member, metadata, timeout_s)
            except TokenRefused:
                if renewed:
                    raise
                renewed = True
                self.forget_token(metadata)
                continue
            except RetryableError:
                self.avoid(member)
                raise
            self.check_cluster(answer.header)
            return answer

    async def _authenticate(self, member: Member) -> str:
        request = rpc_pb2.AuthenticateRequest(name=self.settings.username, password=self.settings.password)
        try:
            with self.errors(member):
                answer = await member.auth.Authenticate(request, timeout=self.settings.attempt_timeout_s)
        except FatalError as error:
            if "not enabled" in error.message:
                # As etcd's own client does: who turns authentication off for a repair must not stop the fleet.
                _log.warning("etcd at %s has no authentication enabled: going on without", member.address)
                return ""
            remedy = "check the store's username and password"
            raise Denied(error.message, reason="STORE_DENIED", field="username", remedy=remedy) from error
        return answer.token

    def _now(self) -> float:
        return asyncio.get_running_loop().time()



def _closed() -> Unavailable:
    return Unavailable("the store is closed", reason="STORE_CLOSED")
