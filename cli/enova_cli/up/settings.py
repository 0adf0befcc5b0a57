"""The settings files that `enova up` writes for each program, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from enova_cli.up.layout import DataDirectory, socket_path
from enova_cli.up.plan import UpOptions, catalogue, engine_words, gpu_memory_bytes

CPU_SLOT_BYTES = 4 << 30  # what a vLLM on the CPU is granted: its KV space and a small model
RETIRED_STREAMS_LIMIT_S = 10.0


def gpu_memory(options: UpOptions) -> int:
    """The memory of one GPU of the fleet."""
    return CPU_SLOT_BYTES if options.gpu_type == "CPU" else gpu_memory_bytes(options.gpu_type)


def coordinator(
    options: UpOptions, data: DataDirectory, etcd: str, ports: Mapping[str, Any], ready_file: Path
) -> dict[str, Any]:
    """coordinator.toml."""
    store: dict[str, Any] = {"kind": "etcd", "endpoints": [etcd]} if etcd else {"kind": "sqlite"}
    return {
        "name": "coordinator",
        "listen": str(ports.get("api") or f"127.0.0.1:{options.port}"),
        "data_dir": str(data.path / "coordinator"),
        "ready_file": str(ready_file),
        "store": store,
    }


def agent(
    options: UpOptions, data: DataDirectory, node: str, api: str, memory_bytes: int, ready_file: Path
) -> dict[str, Any]:
    """agent.toml of one node."""
    folder = data.node_path(node)
    value: dict[str, Any] = {
        "node": node,
        "coordinators": [api],
        "data_dir": str(folder / "agent"),
        "socket": str(socket_path(data, node)),
        "ready_file": str(ready_file),
        "gpus": "simulated",
        "simulated_gpus": [
            {"type": options.gpu_type, "memory_bytes": memory_bytes, "uuid": f"GPU-sim-{node}-{index}", "index": index}
            for index in range(options.gpus_per_node)
        ],
        "engine": {
            "kind": options.engine,
            "command": engine_words(options),
            "extra_arguments": list(options.engine_arguments),
        },
    }
    if options.engine == "simulated":
        models = folder / "simulated_models.json"
        import json

        models.write_text(json.dumps(catalogue("--models")))
        value["simulated_models"] = str(models)
    return value


def ingress(
    options: UpOptions, data: DataDirectory, node: str, ports: Mapping[str, Any], ready_file: Path
) -> dict[str, Any]:
    """ingress.toml of one node: the first node's takes the given port, the others any."""
    first = node == options.node_names()[0]
    folder = data.node_path(node)
    return {
        "node": node,
        "listen": str(ports.get("openai_address") or f"127.0.0.1:{options.openai_port if first else 0}"),
        "hop_listen": str(ports.get("hop_address") or "127.0.0.1:0"),
        "data_dir": str(folder / "ingress"),
        "socket": str(socket_path(data, node)),
        "ready_file": str(ready_file),
        "always_hop": True,
    }
