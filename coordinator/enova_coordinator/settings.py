"""The settings of enova-coordinator: one TOML file, ENOVA_COORDINATOR_* on top; each with unit, default and reason."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from enova_common.errors import InvalidField
from enova_common.logs import LogForm
from enova_common.settings import TlsSettings, between


class StoreKind(StrEnum):
    """Where cluster state lives."""

    SQLITE = "sqlite"
    ETCD = "etcd"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """The store. SQLite is for one coordinator alone; several share an etcd cluster."""

    kind: StoreKind = StoreKind.SQLITE
    path: Path | None = None
    """Of the SQLite file; default store.sqlite in data_dir."""
    endpoints: tuple[str, ...] = ()
    """Of etcd, HOST:PORT each; all members, so that one that dies costs nothing."""
    tls: TlsSettings | None = None
    user: str = ""
    """Of etcd's own authentication; empty: none."""
    password_file: Path | None = None
    """Holds the user's password and nothing else, readable by this program alone."""
    history_keep_s: float = field(default=300.0, metadata=between(1.0))
    """History of the store that watches may resume from; older is compacted."""

    def __post_init__(self) -> None:
        if self.kind is StoreKind.ETCD and not self.endpoints:
            raise InvalidField("etcd needs at least one HOST:PORT", field="endpoints")
        if self.kind is StoreKind.SQLITE and self.endpoints:
            raise InvalidField('a list of endpoints belongs to kind = "etcd"', field="endpoints")
        if bool(self.user) != (self.password_file is not None):
            raise InvalidField("user and password_file are given together", field="user")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    """When policies are asked and may act. All of model time but the deadline."""

    interval_s: float = field(default=30.0, metadata=between(1.0, 3600.0))
    """Between two questions; 0.0.7 asked every 30 s."""
    cooldown_s: float = field(default=60.0, metadata=between(0.0, 86_400.0))
    """After an act, until the next on the same deployment."""
    timeout_s: float = field(default=5.0, metadata=between(0.1, 60.0))
    """Real time for one answer; then the child process is killed and replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceSettings:
    """The recommender: how long it may take, and when better configurations are looked for."""

    timeout_s: float = field(default=30.0, metadata=between(0.1, 600.0))
    """Real time for one answer; then its process is killed and replaced."""
    creation_wait_s: float = field(default=15.0, metadata=between(0.0, 60.0))
    """Real time that a new deployment waits for its configuration; then engines run with their own defaults."""
    interval_s: float = field(default=300.0, metadata=between(1.0, 86_400.0))
    """Model time between two looks for better configurations."""
    gain_min: float = field(default=0.1, metadata=between(0.0, 1.0))
    """Share of the cost of a request that a better configuration must save to be worth a rollout."""
    gpus_file: Path | None = None
    """JSON list of GPU types that the catalogue lacks or prices otherwise, as for `enova recommend --gpus-file`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """Everything that an operator may set."""

    name: str = field(default_factory=socket.gethostname)
    """Of this coordinator, shown as the leader."""
    listen: str = "127.0.0.1:7700"
    """HOST:PORT of the API; port 0 takes any. Off the loopback only with tls."""
    advertise: str = ""
    """HOST:PORT at which agents, users and the other coordinators reach this one; default: listen."""
    metrics_listen: str = "127.0.0.1:0"
    """HOST:PORT of /metrics for Prometheus; empty: not served."""
    data_dir: Path = Path("/var/lib/enova/coordinator")
    """Holds the SQLite store, the rollups and what policies were told."""
    tls: TlsSettings | None = None
    """Mutual TLS of the API."""
    store: StoreSettings = StoreSettings()
    scaling: ScalingSettings = ScalingSettings()
    advice: AdviceSettings = AdviceSettings()
    heartbeat_interval_s: float = field(default=1.0, metadata=between(0.1, 60.0))
    """Real time between two heartbeats of an agent."""
    suspect_after_s: float = field(default=3.0, metadata=between(0.2, 600.0))
    """Real time of silence after which a node is SUSPECT."""
    lost_after_s: float = field(default=10.0, metadata=between(0.5, 3600.0))
    """Real time of silence after which a node is LOST."""
    lost_grace_s: float = field(default=20.0, metadata=between(0.0, 86_400.0))
    """Real time from LOST until its replicas are replaced elsewhere."""
    frame_interval_s: float = field(default=1.0, metadata=between(0.2, 60.0))
    """Real time between two telemetry frames of an agent; a fast model clock asks for denser ones."""
    telemetry_window_s: float = field(default=600.0, metadata=between(300.0, 7200.0))
    """Model time of telemetry that is kept in memory; 70 kB a GPU and replica at the default."""
    rollup_bytes_max: int = field(default=4 << 30, metadata=between(1 << 20))
    """Of the rollups' file; over it the oldest go."""
    situation_bytes_max: int = field(default=1 << 30, metadata=between(1 << 20))
    """Of the file of what policies were told, which `enova replay` reads; over it the oldest go, as after 7 days."""
    leader_ttl_s: int = field(default=3, metadata=between(2, 60))
    """Real time until another coordinator may lead after this one fell silent."""
    ready_file: Path | None = None
    """Written once the API listens: pid and addresses as JSON. For those who start this program."""
    log_form: LogForm = LogForm.JSON
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        if self.lost_after_s <= self.suspect_after_s:
            raise InvalidField(f"{self.lost_after_s:g} is not after suspect_after_s", field="lost_after_s")
