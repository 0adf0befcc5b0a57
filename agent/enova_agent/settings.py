"""The settings of `enova-agent`: a TOML file, and variables ENOVA_AGENT_* that win over it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from enova_agent.engine_settings import EngineSettings
from enova_agent.simulated_gpu import SimulatedGpuSettings
from enova_common.address import parse_address
from enova_common.errors import InvalidField
from enova_common.logs import LogForm
from enova_common.settings import TlsSettings, between

PREFIX = "ENOVA_AGENT"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SOCKET_PATH_BYTES_MAX = 107   # what the kernel takes


class GpuSource(StrEnum):
    """Where this host's GPUs are read."""

    NVML = "nvml"
    NONE = "none"
    SIMULATED = "simulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """All times are real seconds."""

    node: str
    """The node's name in the fleet; lower case letters, digits and dashes. With TLS the certificate must bear it."""

    coordinators: tuple[str, ...] = field(metadata=between(1, 16))
    """host:port of every coordinator; the agent finds the leader among them."""

    data_dir: Path
    """What must outlive the agent: journal, term, last assignment, engines' logs. One agent a directory."""

    cluster: str = "default"
    """The named group of nodes with one network that this node belongs to."""

    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Anything that people want to tell nodes apart by."""

    socket: Path | None = None
    """Where ingress and `enova up` reach this agent; agent.sock in data_dir if not given."""

    tls: TlsSettings | None = None
    """Needed to reach coordinators that are not on the loopback."""

    gpus: GpuSource = GpuSource.NVML
    """A host without a driver has no GPUs, whatever is set here."""

    simulated_gpus: tuple[SimulatedGpuSettings, ...] = ()
    """The GPUs of gpus = "simulated"."""

    simulated_models: Path | None = None
    """The catalogue of models that simulated engines know, as JSON."""

    model_roots: tuple[Path, ...] = ()
    """Models are looked for below these folders only; empty: anywhere."""

    engine: EngineSettings = field(default_factory=EngineSettings)
    """How engines are started and watched."""

    frame_interval_s: float = field(default=1.0, metadata=between(0.1, 60.0))
    """One frame of telemetry so often, unless the coordinator says otherwise."""

    heartbeat_interval_s: float = field(default=1.0, metadata=between(0.1, 30.0))
    """A sign of life so often."""

    heartbeat_timeout_s: float = field(default=5.0, metadata=between(0.5, 120.0))
    """A coordinator that is silent for longer is given up, and looked for again."""

    reconnect_initial_s: float = field(default=0.25, metadata=between(0.01, 60.0))
    """The longest wait before the second try to connect; it doubles with each."""

    reconnect_maximum_s: float = field(default=8.0, metadata=between(0.1, 600.0))
    """The longest wait between two tries: a leader that comes back is found within it."""

    metrics_listen: str = "127.0.0.1:0"
    """Where the agent's own /metrics is served, on the loopback; empty: nowhere."""

    ready_file: Path | None = None
    """Written as JSON once the agent is up."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

    log_form: LogForm = LogForm.AUTO
    """How log records are written."""

    def __post_init__(self) -> None:
        for name, value in (("node", self.node), ("cluster", self.cluster)):
            if _NAME.fullmatch(value) is None:
                raise InvalidField(f"{value!r} is not a name: lower case letters, digits and dashes", field=name)
        for address in self.coordinators:
            if not parse_address(address, field="coordinators").is_loopback and self.tls is None:
                raise InvalidField(
                    f"refusing to reach {address} in plaintext", field="tls",
                    remedy="give tls.ca, tls.cert and tls.key (enova certs init, enova certs issue), or use 127.0.0.1",
                )
        if self.metrics_listen and not parse_address(self.metrics_listen, field="metrics_listen").is_loopback:
            raise InvalidField("must be on the loopback: it is served without TLS", field="metrics_listen")
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise InvalidField("must be longer than heartbeat_interval_s", field="heartbeat_timeout_s")
        if len(str(self.socket_path).encode()) > _SOCKET_PATH_BYTES_MAX:
            raise InvalidField(f"{self.socket_path} is too long for a socket", field="socket")
        if not 0 <= self.engine.session_nice <= 19:
            raise InvalidField("must be 0 to 19", field="engine.session_nice")
        uuids = [gpu.uuid for gpu in self.simulated_gpus]
        if len(set(uuids)) < len(uuids):
            raise InvalidField("two GPUs have the same uuid", field="simulated_gpus")

    @property
    def socket_path(self) -> Path:
        """The socket's path."""
        return self.socket or self.data_dir / "agent.sock"
