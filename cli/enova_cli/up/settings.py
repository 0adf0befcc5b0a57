"""The settings files that `enova up` writes for each program, as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enova_cli.up.layout import DataDirectory, socket_path
from enova_cli.up.plan import UpOptions, catalogue, engine_words
from enova_common.errors import InvalidField

# What a CPU slot is said to hold; nothing enforces it. Scaling's rules reckon as on a GPU, with at least 5 GiB of
# activations beside the weights: in a slot of less than 9 GiB they would never add a replica.
CPU_SLOT_BYTES = 12 << 30
# One GiB of KV cache, as the CPU slot's memory allows; the rest keeps a test host offline and quiet.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# A real engine may compute on every core of the machine that it shares with the programs that watch it: without this
# they waited up to 1.2 s for a core, with it 60 ms (vLLM on two cores, measured), and lost their leases and sessions.
ENGINE_SESSION_NICE = 10


def gpu_facts(options: UpOptions) -> dict[str, Any]:
    """What an agent is told of each GPU of the fleet. Raises InvalidField for a type that nobody knows."""
    if options.gpu_type == "CPU":
        return {"memory_bytes": CPU_SLOT_BYTES, "idle_power_w": 0.0, "power_limit_w": 0.0}
    known = {gpu["name"]: gpu for gpu in catalogue("--gpus")}
    if options.gpu_type not in known:
        remedy = f"one of CPU, {', '.join(known)}"
        raise InvalidField(f"unknown GPU type {options.gpu_type!r}", field="--gpu", remedy=remedy)
    fact = known[options.gpu_type]
    return {
        "memory_bytes": int(fact["memory_bytes"]),
        "idle_power_w": float(fact["idle_power_w"]),
        "power_limit_w": float(fact["power_limit_w"]),
    }


def coordinator(
    options: UpOptions, data: DataDirectory, etcd: str, ports: Mapping[str, Any], ready_file: Path
) -> dict[str, Any]:
    """coordinator.toml."""
    store: dict[str, Any] = {"kind": "etcd", "endpoints": [etcd]} if etcd else {"kind": "sqlite"}
    return {
        "name": "coordinator",
        "listen": _listen(options.port, ports.get("api")),
        "data_dir": str(data.path / "coordinator"),
        "ready_file": str(ready_file),
        "store": store,
    }


def agent(
    options: UpOptions, data: DataDirectory, node: str, api: str, gpu: Mapping[str, Any], ready_file: Path
) -> dict[str, Any]:
    """agent.toml of one node; `gpu` holds the catalogue's facts of its GPUs."""
    folder = data.node_path(node)
    value: dict[str, Any] = {
        "node": node,
        "coordinators": [api],
        "data_dir": str(folder / "agent"),
        "socket": str(socket_path(data, node)),
        "ready_file": str(ready_file),
        "frame_interval_s": options.frame_interval_s,
        "gpus": "simulated",
        "simulated_gpus": [
            {"uuid": f"GPU-simulated-{node}-{index}", "index": index, "type": options.gpu_type, **gpu}
            for index in range(options.gpus_per_node)
        ],
        "engine": {"kind": options.engine, "command": engine_words(options)},
    }
    if options.engine == "simulated":
        models = folder / "simulated_models.json"
        models.write_text(json.dumps(catalogue("--models")))
        value["simulated_models"] = str(models)
        value["engine"]["extra_arguments"] = [*_clock_arguments(options, data), *options.engine_arguments]
    else:
        value["engine"]["extra_arguments"] = list(options.engine_arguments)
        value["engine"]["session_nice"] = ENGINE_SESSION_NICE
        value["engine"]["environment"] = CPU_ENVIRONMENT if options.gpu_type == "CPU" else {}
    return value


def _listen(port: int, before: str | None) -> str:
    """The port that was asked for; where any will do, the one of last time."""
    return f"127.0.0.1:{port}" if port else before or "127.0.0.1:0"


def _clock_arguments(options: UpOptions, data: DataDirectory) -> list[str]:
    epoch = data.read_json("clock.json")["epoch_s"]
    return [
        "--simulated-gpu", "{gpu_types}",
        "--simulated-time-scale", f"{options.time_scale:g}", "--simulated-clock-epoch", f"{epoch:.6f}",
    ]  # fmt: skip


def ingress(
    options: UpOptions, data: DataDirectory, node: str, ports: Mapping[str, Any], ready_file: Path
) -> dict[str, Any]:
    """ingress.toml of one node: the first node's takes the given port, the others any."""
    first = node == options.node_names()[0]
    folder = data.node_path(node)
    return {
        "node": node,
        "listen": _listen(options.openai_port if first else 0, ports.get("openai_address")),
        "hop_listen": str(ports.get("hop_address") or "127.0.0.1:0"),
        "data_dir": str(folder / "ingress"),
        "socket": str(socket_path(data, node)),
        "ready_file": str(ready_file),
        "always_hop": True,
    }
