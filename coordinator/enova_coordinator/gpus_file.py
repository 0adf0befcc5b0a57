"""Reads the operator's file of GPU types and prices."""

from __future__ import annotations

import json
from pathlib import Path

from enova_common.errors import InvalidField
from enova_coordinator.core.gpu_types import GpuTypes, described_types
from enova_recommender.recommend.request import RequestError, described_gpus

FILE_BYTES_MAX = 1 << 20
_FIELD = "advice.gpus_file"


def read_gpu_types(path: Path | None) -> GpuTypes:
    """The types of the file; none without one. Raises InvalidField."""
    if path is None:
        return GpuTypes()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidField(f"cannot read {path}: {error.strerror}", field=_FIELD) from error
    if len(content) > FILE_BYTES_MAX:
        raise InvalidField(f"{path} has over {FILE_BYTES_MAX} bytes", field=_FIELD, remedy="list GPU types alone")
    try:
        return described_types(described_gpus(json.loads(content)))
    except RequestError as error:
        raise InvalidField(f"{path}: {error.field} {error.message}", field=_FIELD, remedy=error.remedy) from error
    except ValueError as error:
        raise InvalidField(f"{path} is not JSON: {error}", field=_FIELD) from error
