"""How this host starts and watches engines: the part of the agent's settings that the supervisor needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from enova_agent.core.command import EngineCommand
from enova_agent.core.machine import Limits
from enova_agent.core.progress import HangLimits
from enova_agent.core.restart import RestartPolicy
from enova_common.backoff import Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Times are real seconds."""

    command: tuple[str, ...] = ("vllm", "serve")
    """The words that start an engine; the model and the flags come after them."""

    kind: str = "vllm"
    """What these words start: "vllm" or "simulated". A deployment that asks for another kind is refused."""

    extra_arguments: tuple[str, ...] = ()
    """Put before enova's own arguments, for every engine; {replica}, {gpu_uuids} and {gpu_types} are filled in."""

    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Set for every engine, beside the few variables that are passed on from the agent's own environment."""

    allow_downloads: bool = False
    """Models named org/name[@revision] may be fetched from the hub; off, engines are told to stay offline."""

    download_free_bytes_min: int = 32 << 30
    """A model that is not here yet is fetched only with so much free on the disk of the hub's cache."""

    shutdown_timeout: bool = True
    """The engine knows --shutdown-timeout (vLLM 0.22 and later do)."""

    cgroup: str = ""
    """A cgroup (version 2) that the agent may write to; each engine gets one below it. Empty: sessions and tokens."""

    session_nice: int = 0
    """Of a serving engine's scheduling group (autogroup), 0 to 19: what computes beside it on this CPU goes first."""

    tick_s: float = 0.5
    """How often each replica is looked at: bounds how late anything is noticed."""

    scrape_interval_s: float = 1.0
    """How often /metrics of each engine is read, with a deadline of as much."""

    log_bytes_max: int = 16 << 20
    """Of one engine's log; as much again is kept from before."""

    start_stall_s: float = 300.0
    """A start that shows no progress (log, CPU time, memory, reading) for so long is given up and tried again."""

    start_limit_s: float = 7200.0
    """A start that takes longer is given up, whatever its progress."""

    drain_settle_s: float = 0.5
    """A draining engine must have been out of routing for so long before it counts as empty."""

    term_timeout_s: float = 10.0
    """From SIGTERM to SIGKILL of everything."""

    restart_initial_s: float = 1.0
    """The delay before the first restart; it doubles with each restart in the window."""

    restart_maximum_s: float = 300.0
    """The longest delay before a restart."""

    restart_attempts_max: int = 8
    """More restarts within the window make the replica FAILED until somebody changes something."""

    restart_window_s: float = 600.0
    """The window of restart_attempts_max."""

    canary_interval_s: float = 2.0
    """An idle engine is asked for one token so often."""

    suspect_after_s: float = 2.0
    """Without progress and activity, with work to do, for so long: out of routing."""

    hung_after_s: float = 5.5
    """The same for so long: evidence is kept, the engine is killed and started again."""

    busy_suspect_after_s: float = 600.0
    """As suspect_after_s, for an engine that computes but makes no progress: longer than any prefill."""

    busy_hung_after_s: float = 900.0
    """As hung_after_s, for an engine that computes but makes no progress."""

    @property
    def limits(self) -> Limits:
        """The deadlines of a replica's life."""
        backoff = Backoff(initial_s=self.restart_initial_s, maximum_s=self.restart_maximum_s, jitter=0.2)
        return Limits(
            start_stall_s=self.start_stall_s,
            start_limit_s=self.start_limit_s,
            drain_settle_s=self.drain_settle_s,
            term_timeout_s=self.term_timeout_s,
            restart=RestartPolicy(
                backoff=backoff, attempts_max=self.restart_attempts_max, window_s=self.restart_window_s
            ),
        )

    @property
    def hang_limits(self) -> HangLimits:
        """When missing progress is a hang."""
        return HangLimits(
            canary_interval_s=self.canary_interval_s,
            suspect_after_s=self.suspect_after_s,
            hung_after_s=self.hung_after_s,
            busy_suspect_after_s=self.busy_suspect_after_s,
            busy_hung_after_s=self.busy_hung_after_s,
        )

    @property
    def engine_command(self) -> EngineCommand:
        """How an engine is started."""
        return EngineCommand(
            words=self.command,
            kind=self.kind,
            extra_arguments=self.extra_arguments,
            environment=self.environment,
            allow_downloads=self.allow_downloads,
            shutdown_timeout=self.shutdown_timeout,
            term_timeout_s=self.term_timeout_s,
        )
