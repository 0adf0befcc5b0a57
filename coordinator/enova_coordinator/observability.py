"""The coordinator's own figures for Prometheus, read from its parts when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from enova_common.address import Address, parse_address
from enova_common.errors import AlreadyExists, CallerError
from enova_common.settings import TlsSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One family of figures: by label value (by several: their values), or by "" where there is no label."""

    name: str
    help: str
    values: Mapping[str, float] | Mapping[tuple[str, ...], float]
    label: str | tuple[str, ...] = ""
    counter: bool = False


class _Figures(Collector):
    def __init__(self, read: Callable[[], list[Figure]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for figure in self._read():
            family = CounterMetricFamily if figure.counter else GaugeMetricFamily
            labels = [figure.label] if isinstance(figure.label, str) else list(figure.label)
            labels = labels if figure.label else []
            metric = family(f"enova_coordinator_{figure.name}", figure.help, labels=labels)
            for value, number in figure.values.items():
                metric.add_metric(([value] if isinstance(value, str) else list(value)) if labels else [], number)
            yield metric


class MetricsServer:
    """/metrics on an address of its own; mutual TLS where the coordinator has it, else the loopback alone."""

    def __init__(self, listen: str, read: Callable[[], list[Figure]], *, tls: TlsSettings | None) -> None:
        wanted = parse_address(listen, field="metrics_listen")
        if tls is None and not wanted.is_loopback:
            raise CallerError(
                f"refusing to serve metrics on {wanted} in plaintext",
                reason="PLAINTEXT_REFUSED",
                field="metrics_listen",
                remedy="give tls, or listen on 127.0.0.1",
            )
        registry = CollectorRegistry()
        registry.register(_Figures(read))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        try:
            self._server, self._thread = _start(wanted, registry, tls)
        except OSError as error:
            raise AlreadyExists(
                f"cannot listen on {wanted}: {error.strerror or error}",
                reason="CANNOT_LISTEN",
                field="metrics_listen",
                remedy="choose another port, or 0 for any",
            ) from error
        self.address = str(Address(wanted.host, self._server.server_port))

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _start(wanted: Address, registry: CollectorRegistry, tls: TlsSettings | None):  # type: ignore[no-untyped-def]
    if tls is None:
        return start_http_server(wanted.port, wanted.host, registry)
    return start_http_server(
        wanted.port,
        wanted.host,
        registry,
        certfile=_text(tls.cert),
        keyfile=_text(tls.key),
        client_cafile=_text(tls.ca),
        client_auth_required=True,
    )


def _text(path: Path) -> str:
    return str(path)
