"""An assigned member -> the words and the environment that start its engine; pure.

Arguments come from the allow-list of `enova_common.vllm.FLAGS` and from the host's own settings, never from
anywhere else, and are handed to the kernel as a list: no shell reads them. Whatever the host's settings add
stands before what enova itself decides, so that address, port and names cannot be overridden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from enova_agent.core.hub import HubModel, hub_model
from enova_agent.core.model import FlagValue, MemberSpec
from enova_common.errors import InvalidField
from enova_common.vllm import FLAGS

LOOPBACK = "127.0.0.1"
TOKEN_VARIABLE = "ENOVA_ENGINE_TOKEN"  # noqa: S105  the name of a variable
REPLICA_VARIABLE = "ENOVA_REPLICA"
RECORD_VARIABLE = "ENOVA_ENGINE_RECORD"

# What an engine may see of the agent's own environment: where programs, libraries, caches and the locale are.
# Not here on purpose: VLLM_* and PYTHON* (they load code or open development routes), LD_PRELOAD, secrets.
PASSED_VARIABLES = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "XDG_CACHE_HOME",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH",
    "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "ENOVA_TIME_SCALE", "ENOVA_CLOCK_EPOCH",
)

# Only for an engine that may fetch its model. The token goes by the environment: argv is everybody's to read.
DOWNLOAD_VARIABLES = ("HF_TOKEN", "HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HTTPS_PROXY", "NO_PROXY")
SIMULATED = "simulated"            # such engines have names of the catalogue, and fetch nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCommand:
    """How this host starts an engine, whatever it serves."""

    words: tuple[str, ...] = ("vllm", "serve")
    kind: str = "vllm"             # what `engine` of a deployment must name, if it names anything
    extra_arguments: tuple[str, ...] = ()  # after them come enova's own; may hold {replica}, {gpu_uuids}, {gpu_types}
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    passed_variables: tuple[str, ...] = PASSED_VARIABLES
    allow_downloads: bool = False
    shutdown_timeout: bool = True  # this vLLM knows --shutdown-timeout
    term_timeout_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is handed to the kernel."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def build(
    spec: MemberSpec,
    engine: EngineCommand,
    *,
    port: int,
    token: str,
    record: str,
    gpu_types: Mapping[str, str],
    ambient: Mapping[str, str],
) -> Command:
    """The command for one member on `port`. Raises InvalidField naming what in the spec cannot be started.

    `record` goes into the environment: an agent that lost its journal learns from it what the engine is for.
    """
    _check(spec, engine)
    serves = engine.words[-1] == "serve"  # `vllm serve MODEL`, but `api_server --model MODEL`
    hub = fetched_model(spec, engine)
    model = spec.model if hub is None else hub.name
    argv = [*engine.words, *([model] if serves else ["--model", model])]
    argv += ["--revision", hub.revision] if hub is not None and hub.revision else []
    argv += flags(spec.configuration)
    argv += _extra(spec, engine, gpu_types)
    if engine.shutdown_timeout:
        # A second less than the agent's patience, so that the engine ends by itself.
        argv += ["--shutdown-timeout", str(max(1, math.floor(engine.term_timeout_s) - 1))]
    argv += ["--host", LOOPBACK, "--port", str(port), "--served-model-name", *served_names(spec)]
    environment = _environment(spec, engine, token=token, record=record, ambient=ambient)
    return Command(argv=tuple(argv), environment=environment)


def fetched_model(spec: MemberSpec, engine: EngineCommand) -> HubModel | None:
    """The hub's model that the engine may fetch, None if it has its own. Raises InvalidField where it may not."""
    hub = None if engine.kind == SIMULATED else hub_model(spec.model)
    if hub is not None and not engine.allow_downloads:
        raise downloads_refused(spec.model)
    return hub


def downloads_refused(model: str) -> InvalidField:
    """What a host says that fetches nothing; the remedy stands in the message, for only that crosses the stream."""
    remedy = "set engine.allow_downloads = true in its agent.toml, or give the absolute path of a model directory"
    return InvalidField(
        f"{model} is a model of the hub, and this host fetches none: {remedy}", field="model", remedy=remedy,
        reason="DOWNLOADS_NOT_ALLOWED",
    )


def flags(configuration: Mapping[str, FlagValue]) -> list[str]:
    """The configuration as words of a command line. Raises InvalidField for a flag or value not on the list."""
    words: list[str] = []
    for name, value in sorted(configuration.items()):
        flag = FLAGS.get(name)
        if flag is None:
            raise InvalidField(
                "is not a setting of the engine that enova passes on", field=f"configuration.{name}",
                remedy="remove it, or set it for the host in the agent's extra arguments",
            )
        problem = flag.problem(value)
        if problem is not None:
            raise InvalidField(problem, field=f"configuration.{name}", remedy="correct the deployment's configuration")
        if isinstance(value, bool):
            words.append(flag.option if value else flag.negative_option)
        else:
            words += [flag.option, str(value)]
    return words


def served_names(spec: MemberSpec) -> tuple[str, ...]:
    """The names the engine answers to: those given, else the deployment's own."""
    return spec.served_names or (spec.deployment.rsplit("/", 1)[-1],)


def max_concurrency(spec: MemberSpec) -> int:
    """How many requests its engine runs at once, as far as the configuration says; vLLM's own default else."""
    value = spec.configuration.get("max_num_seqs")
    return value if isinstance(value, int) and not isinstance(value, bool) else 256


def _check(spec: MemberSpec, engine: EngineCommand) -> None:
    if spec.engine and spec.engine != engine.kind:
        raise InvalidField(
            f"is {spec.engine!r}, but this host starts {engine.kind!r}", field="engine",
            remedy="leave the engine out, or place the deployment on other hosts",
        )
    if spec.member_count > 1:
        raise InvalidField(
            "replicas over several nodes cannot be started yet", field="member_count", remedy="use GPUs of one node"
        )
    words = {"model": (spec.model,), "served_names": served_names(spec)}
    for name, values in words.items():
        for value in values:
            if not value or value.startswith("-") or not value.isprintable():
                raise InvalidField(
                    f"{value!r} cannot be a word of a command line", field=name,
                    remedy="give a name that is not empty and does not start with a dash",
                )


def _extra(spec: MemberSpec, engine: EngineCommand, gpu_types: Mapping[str, str]) -> list[str]:
    uuids = [claim.gpu_uuid for claim in spec.claims]
    facts = {
        "replica": spec.replica,
        "gpu_uuids": ",".join(uuids),
        "gpu_types": ",".join(dict.fromkeys(gpu_types.get(uuid, "unknown") for uuid in uuids)),
    }
    return [_fill(word, facts) for word in engine.extra_arguments]


def _fill(word: str, facts: Mapping[str, str]) -> str:
    for name, value in facts.items():
        word = word.replace("{" + name + "}", value)
    return word


def _environment(
    spec: MemberSpec, engine: EngineCommand, *, token: str, record: str, ambient: Mapping[str, str]
) -> Mapping[str, str]:
    environment = {name: ambient[name] for name in engine.passed_variables if name in ambient}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    if fetched_model(spec, engine) is not None:
        environment |= {name: ambient[name] for name in DOWNLOAD_VARIABLES if name in ambient}
    else:
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= engine.environment
    uuids = [claim.gpu_uuid for claim in spec.claims if claim.gpu_uuid.startswith(("GPU-", "MIG-"))]
    if uuids:
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(uuids), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    own = {TOKEN_VARIABLE: token, REPLICA_VARIABLE: spec.replica, RECORD_VARIABLE: record}
    return MappingProxyType(environment | own)
