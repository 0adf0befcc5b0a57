"""The agent's own /metrics, for Prometheus, on the loopback: how the agent is, not what it measures of others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from enova_agent.core.model import ReplicaView
from enova_agent.frames import FrameBuffer
from enova_agent.session import SessionFigures
from enova_common.address import parse_address

HEAD_BYTES_MAX = 8 << 10
REQUEST_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where the figures are read when somebody asks."""

    session: SessionFigures
    buffer: FrameBuffer
    term: Callable[[], int]
    views: Callable[[], Iterable[ReplicaView]]
    gpus: Callable[[], int]
    missed_gpu_rounds: Callable[[], int]
    ingress_connected: Callable[[], bool]
    loop_lag_s: Callable[[], float]


class AgentCollector(Collector):
    """Turns the sources into metric families, at the time of the scrape."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """All families."""
        sources, session = self._sources, self._sources.session
        gauges: tuple[tuple[str, str, float], ...] = (
            ("session_connected", "Whether a leader has welcomed this agent.", bool(session.connected_to)),
            ("term", "The highest leader's term that was obeyed.", sources.term()),
            ("buffered_frames", "Frames kept for a leader that missed some.", len(sources.buffer)),
            ("buffered_bytes", "What they take.", sources.buffer.size_bytes),
            ("gpus", "GPUs of this host.", sources.gpus()),
            ("ingress_connected", "Whether an ingress is connected.", sources.ingress_connected()),
            ("loop_lag_seconds", "How late the event loop ran last.", sources.loop_lag_s()),
        )
        counters: tuple[tuple[str, str, float], ...] = (
            ("connections", "Tries to connect to a coordinator.", session.connections),
            ("refused_terms", "Messages of leaders of the past.", session.refused_terms),
            ("frames_sent", "Frames given to the stream.", session.frames_sent),
            ("frames_passed_over", "Frames that a slow link left behind.", session.frames_passed_over),
            ("gpu_rounds_missed", "Times that NVML did not answer in time.", sources.missed_gpu_rounds()),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"enova_agent_{name}", text, value=float(value))
        for name, text, value in counters:
            yield CounterMetricFamily(f"enova_agent_{name}", text, value=float(value))
        replicas = GaugeMetricFamily("enova_agent_replicas", "Replicas of this node by state.", labels=["state"])
        for state, count in sorted(Counter(view.state.value for view in sources.views()).items()):
            replicas.add_metric([state], count)
        yield replicas


class MetricsServer:
    """Serves GET /metrics, one answer a connection."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Listens; the address with its port."""
        address = parse_address(listen, field="metrics_listen")
        self._server = await asyncio.start_server(self._serve, address.host, address.port, limit=HEAD_BYTES_MAX)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.debug("a reader of /metrics went away: %s", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError):  # it is closed, one way or the other
                await writer.wait_closed()

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b" ", 2)
        if words[:2] != [b"GET", b"/metrics"]:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        body = generate_latest(self._registry)
        return (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )
