"""What `enova up` will run: options checked, and the settings of each program as plain values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enova_common.errors import FatalError, InvalidField

NODES_MAX = 64  # each is two processes; more belongs on more machines
GPUS_PER_NODE_MAX = 16
CATALOGUE_TIMEOUT_S = 30.0
_GPU = re.compile(r"([A-Za-z0-9._-]+):(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """The options of `enova up`."""

    nodes: int
    gpu_type: str
    gpus_per_node: int
    engine: str  # "simulated" or "vllm"
    engine_command: Sequence[str]
    engine_arguments: Sequence[str]
    data_dir: Path
    port: int  # of the coordinator's API; 0: any free one
    openai_port: int  # of the first node's ingress; 0: any free one
    store: str  # "sqlite" or "etcd"
    time_scale: float
    frame_interval_s: float = 1.0

    def node_names(self) -> list[str]:
        """node-0, node-1, ..."""
        return [f"node-{index}" for index in range(self.nodes)]


def parse_gpu(text: str) -> tuple[str, int]:
    """TYPE:COUNT as (type, count). Raises InvalidField."""
    match = _GPU.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= GPUS_PER_NODE_MAX:
        raise InvalidField(f"{text!r} is not TYPE:COUNT with 1 to {GPUS_PER_NODE_MAX}", field="--gpu", remedy="H100:8")
    return match[1], int(match[2])


def catalogue(*arguments: str) -> Any:
    """The simulator's catalogue as JSON: `--gpus` or `--models`."""
    try:
        run = subprocess.run(
            [sys.executable, "-m", "enova_simulator.plan", *arguments],
            capture_output=True,
            check=True,
            timeout=CATALOGUE_TIMEOUT_S,
        )
        return json.loads(run.stdout)
    except subprocess.CalledProcessError as error:
        text = error.stderr.decode(errors="replace").strip()
        raise FatalError(f"enova_simulator.plan failed: {text}", reason="CATALOGUE_FAILED") from error


def program(name: str) -> str:
    """The path of one of our programs: beside this interpreter, or on the PATH. Raises FatalError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FatalError(
            f"{name} is not installed", reason="NOT_INSTALLED", remedy="pip install enova[agent,coordinator]"
        )
    return found


def engine_words(options: UpOptions) -> list[str]:
    """The command that starts an engine, as the agent's settings want it."""
    if options.engine_command:
        return list(options.engine_command)
    if options.engine == "simulated":
        return [program("enova-simulated-engine"), "serve"]
    return ["vllm", "serve"]


def environment(options: UpOptions, base: Mapping[str, str], *, token: str, epoch_s: float) -> dict[str, str]:
    """The environment of every program: the caller's, the token, the model clock."""
    from enova_cli.up.layout import TOKEN_VARIABLE

    return dict(base) | {
        TOKEN_VARIABLE: token,
        "ENOVA_TIME_SCALE": f"{options.time_scale:g}",
        "ENOVA_CLOCK_EPOCH": f"{epoch_s:.6f}",
    }
