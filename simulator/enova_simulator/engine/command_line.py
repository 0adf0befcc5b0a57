"""The command line of `vllm serve`, plus the flags of the simulation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from enova_common.vllm import DEFAULTS, FLAGS, FlagKind

PROGRAM = "enova-simulated-engine"
# Flags of the real server that change nothing here. They are taken so that one command starts either.
_IGNORED_WITH_VALUE = (
    "tokenizer", "tokenizer-mode", "revision", "code-revision", "tokenizer-revision", "download-dir", "chat-template",
    "generation-config", "hf-overrides", "uvicorn-log-level", "root-path", "allowed-origins", "max-log-len",
    "sse-keep-alive-interval", "h11-max-header-count", "api-server-count", "kv-cache-memory-bytes",
    "compilation-config", "max-logprobs", "log-level", "data-parallel-backend", "attention-backend",
    "distributed-executor-backend", "performance-mode",
)  # fmt: skip
_IGNORED_BOOLEAN = (
    "trust-remote-code", "enable-log-requests", "disable-uvicorn-access-log", "kv-cache-metrics", "enable-sleep-mode",
    "scheduler-reserve-full-isl", "disable-fastapi-docs", "enable-prompt-tokens-details", "use-tqdm-on-load",
    "disable-hybrid-kv-cache-manager", "disable-custom-all-reduce", "skip-tokenizer-init",
    "enable-force-include-usage", "log-error-stack", "enable-auto-tool-choice", "enable-log-outputs",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asked for. `configuration` holds vLLM's engine flags; None is vLLM's own choice."""

    model: str
    served_names: tuple[str, ...]
    host: str
    port: int
    api_keys: tuple[str, ...]
    shutdown_timeout_s: float
    load_tracking: bool
    request_id_headers: bool
    configuration: dict[str, int | float | str | bool | None]
    time_scale: float
    clock_epoch_s: float | None
    gpu: str
    gpu_count: int | None
    step_times: Path | None
    start_s: float | None
    faults: Path | None
    core_process: bool

    def integer(self, name: str) -> int | None:
        """An engine flag that counts something."""
        value = self.configuration[name]
        return None if value is None else int(value)

    def text(self, name: str) -> str:
        """An engine flag that is a word."""
        return str(self.configuration[name])


def parse_options(words: Sequence[str]) -> Options:
    """Options from the words after the program's name; usage errors end the process with code 2, as vLLM's do."""
    words = list(words)
    if words[:1] == ["serve"]:
        words = words[1:]
    parser = _parser()
    parsed = parser.parse_args([_normal(word) for word in words])
    values = vars(parsed)
    model = values["model_tag"] or values["model"]
    if not model:
        parser.error("the following arguments are required: model")
    configuration = {name: values[name] if values[name] is not None else DEFAULTS[name] for name in FLAGS}
    for name, flag in FLAGS.items():
        problem = None if values[name] is None else flag.problem(values[name])
        if problem:
            parser.error(f"argument {flag.option}: {problem}")
    if values["simulated_time_scale"] <= 0:
        parser.error("argument --simulated-time-scale: must be above 0")
    return Options(
        model=model,
        served_names=tuple(values["served_model_name"] or [model]),
        host=values["host"] or "127.0.0.1",
        port=values["port"],
        api_keys=tuple(values["api_key"] or ()),
        shutdown_timeout_s=values["shutdown_timeout"],
        load_tracking=bool(values["enable_server_load_tracking"]),
        request_id_headers=bool(values["enable_request_id_headers"]),
        configuration=configuration,
        time_scale=values["simulated_time_scale"],
        clock_epoch_s=values["simulated_clock_epoch"],
        gpu=values["simulated_gpu"],
        gpu_count=values["simulated_gpu_count"],
        step_times=values["simulated_step_times"],
        start_s=values["simulated_start_s"],
        faults=values["simulated_faults"],
        core_process=values["simulated_core_process"],
    )


def _normal(word: str) -> str:
    """vLLM takes `--max_num_seqs` for `--max-num-seqs`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _count(text: str) -> int:
    """A whole number, also as vLLM reads it: 1k is 1000, 1K is 1024."""
    units = {"k": 1000, "m": 1000**2, "g": 1000**3, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    if text and text[-1] in units:
        return int(float(text[:-1]) * units[text[-1]])
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, allow_abbrev=False, description="A simulated vLLM server: same flags, routes and metrics."
    )
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="catalogue name, or folder with a config.json")
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host", help="default 127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one, written to the log")
    parser.add_argument("--api-key", nargs="+")
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="0: abort; above: drain so many seconds")
    for name in ("enable-server-load-tracking", "enable-request-id-headers"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    parser.add_argument("--disable-log-stats", action="store_true")
    _add_engine_flags(parser)
    for name in _IGNORED_WITH_VALUE:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in _IGNORED_BOOLEAN:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
    _add_simulation_flags(parser)
    return parser


_SHORT = {
    "tensor_parallel_size": "-tp", "pipeline_parallel_size": "-pp", "data_parallel_size": "-dp", "quantization": "-q",
}  # fmt: skip


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    for flag in FLAGS.values():
        names = [flag.option, *([_SHORT[flag.name]] if flag.name in _SHORT else [])]
        match flag.kind:
            case FlagKind.BOOLEAN:
                parser.add_argument(*names, action=argparse.BooleanOptionalAction)
            case FlagKind.INTEGER:
                parser.add_argument(*names, type=_count)
            case FlagKind.NUMBER:
                parser.add_argument(*names, type=float)
            case FlagKind.CHOICE:
                parser.add_argument(*names, choices=flag.choices)
            case FlagKind.TEXT:
                parser.add_argument(*names)


def _add_simulation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("simulation")
    group.add_argument("--simulated-time-scale", type=float, default=1.0, metavar="K", help="model seconds a second")
    group.add_argument("--simulated-clock-epoch", type=float, metavar="UNIX_S", help="where model and real time meet")
    group.add_argument("--simulated-gpu", default="H100", metavar="TYPE", help="a type of the catalogue")
    group.add_argument("--simulated-gpu-count", type=int, metavar="N", help="GPUs of this engine")
    group.add_argument("--simulated-step-times", type=Path, metavar="FILE", help="JSON, enova.step_times/v1")
    group.add_argument("--simulated-start-s", type=float, metavar="S", help="model seconds that the start takes")
    group.add_argument("--simulated-faults", type=Path, metavar="FILE", help='JSON: {"faults": [...]}')
    group.add_argument("--simulated-core-process", action=argparse.BooleanOptionalAction, default=True)
