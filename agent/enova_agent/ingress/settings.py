"""The settings of `enova-ingress`: a TOML file, and variables ENOVA_INGRESS_* that win over it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from enova_common.errors import InvalidField
from enova_common.logs import LogForm
from enova_common.settings import TlsSettings, between

PREFIX = "ENOVA_INGRESS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTls:
    """The operator's files towards applications, in PEM."""

    cert: Path
    """The certificate, followed by intermediate ones."""
    key: Path
    """Its private key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSettings:
    """All times are real seconds."""

    socket: Path
    """The agent's local socket."""

    data_dir: Path
    """Last routes and engines, request records, the key of their hashes. One ingress a directory."""

    node: str = ""
    """The node's name in records; the agent's word wins."""

    listen: str = "127.0.0.1:8000"
    """Where applications connect, host:port; port 0 is any free one."""

    advertise: str = ""
    """The host:port by which applications reach `listen`, where that is another one; `enova get nodes` shows it."""

    tls: ServingTls | None = None
    """Towards applications; without it `listen` must be on the loopback, or `insecure_http` set."""

    insecure_http: bool = False
    """Plain HTTP to applications on other hosts; logged at each start."""

    hop_listen: str = "127.0.0.1:8001"
    """Where the ingresses of other nodes connect."""

    hop_advertise: str = ""
    """The address by which other nodes reach `hop_listen`, where that is another one."""

    hop_tls: TlsSettings | None = None
    """Between ingresses; without it both ends must be on the loopback."""

    always_hop: bool = False
    """Reach the replicas of this node through the hop too."""

    metrics_listen: str = "127.0.0.1:0"
    """Prometheus /metrics; on the loopback, since labels name deployments."""

    ready_file: Path | None = None
    """Written once it listens: JSON with the pid and the addresses."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

    log_form: LogForm = LogForm.AUTO
    """JSON lines, text, or text on a terminal only."""

    connections_max: int = field(default=8192, metadata=between(1, 1_000_000))
    """Of each listener; more are closed at once."""

    requests_max: int = field(default=4096, metadata=between(1, 1_000_000))
    """Open at the same time; more are answered with 503."""

    body_bytes_max: int = field(default=32 << 20, metadata=between(1024, 1 << 30))
    """Of one request."""

    bodies_bytes_max: int = field(default=1 << 30, metadata=between(1024))
    """Of all open requests together."""

    body_timeout_s: float = field(default=30.0, metadata=between(0.01, 3600))
    """For a request's body to arrive."""

    keepalive_s: float = field(default=75.0, metadata=between(0.01, 3600))
    """A connection that is idle, or slow with its headers, is closed after this."""

    queue_timeout_s: float = field(default=60.0, metadata=between(0.01, 3600))
    """The longest wait for a place in an engine; a request may ask for less."""

    waiting_requests_max: int = field(default=100, metadata=between(0, 100_000))
    """That wait for the first replica of a deployment that was scaled to zero; more are answered with 503."""

    waiting_bytes_max: int = field(default=64 << 20, metadata=between(0))
    """Of the bodies of those that wait so."""

    waiting_s: float = field(default=300.0, metadata=between(0.01, 3600))
    """How long one waits so at most."""

    connect_timeout_s: float = field(default=0.5, metadata=between(0.01, 60))
    """To an engine or another ingress: a dead one is left within a second."""

    first_byte_timeout_s: float = field(default=1800.0, metadata=between(0.01, 86400))
    """Until an engine's answer begins: long prompts, and long answers that are not streamed."""

    idle_timeout_s: float = field(default=120.0, metadata=between(0.01, 86400))
    """Between two pieces of an answer; then it is cut with an error."""

    drain_timeout_s: float = field(default=30.0, metadata=between(0, 3600))
    """For open requests after SIGTERM."""

    frame_interval_s: float = field(default=1.0, metadata=between(0.05, 60))
    """Between two summaries to the agent."""

    held_interval_s: float = field(default=0.25, metadata=between(0.01, 10))
    """Between two counts of what is held, if they changed."""

    record_file_bytes_max: int = field(default=16 << 20, metadata=between(4096, 1 << 30))
    """Of one file of request records."""

    embeddings_address: str = ""
    """host:port, on the loopback, of an own model behind /v1/embeddings that makes prompts' vectors, where deployments
    learn limits on answers (max_tokens_policy); empty: hashed n-grams. The same model on all nodes."""

    embeddings_model: str = ""
    """The model's name there; `embeddings_address` and it are given together."""

    record_files_max: int = field(default=8, metadata=between(1, 10_000))
    """The oldest file goes when there are more."""

    def __post_init__(self) -> None:
        for name in ("listen", "hop_listen", "metrics_listen"):
            host_and_port(getattr(self, name), field=name)
        if self.tls is None and not self.insecure_http and not is_loopback(self.listen):
            raise InvalidField(
                f"{self.listen} is not on the loopback and there is no certificate", field="listen",
                remedy="add a table [tls] with cert and key, or set insecure_http where something else encrypts",
            )
        if self.hop_tls is None and not is_loopback(self.hop_listen):
            raise InvalidField(
                f"{self.hop_listen} is not on the loopback and there is no certificate", field="hop_listen",
                remedy="add a table [hop_tls] with the files of `enova certs issue`",
            )
        if bool(self.embeddings_address) != bool(self.embeddings_model):
            raise InvalidField("is given together with embeddings_address", field="embeddings_model")
        if self.embeddings_address:
            host_and_port(self.embeddings_address, field="embeddings_address")
            if not is_loopback(self.embeddings_address):
                raise InvalidField("prompts leave this host for no model", field="embeddings_address")
        if not is_loopback(self.metrics_listen):
            raise InvalidField("metrics are served on the loopback only", field="metrics_listen")


def host_and_port(address: str, *, field: str) -> tuple[str, int]:
    """The parts of `host:port`, `[v6]:port` or `:port` (all interfaces). Raises InvalidField."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise InvalidField(f"{address!r} is not host:port", field=field)
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(address: str) -> bool:
    """The address, `host:port`, can be reached from this host only."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
