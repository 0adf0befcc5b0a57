"""The file in which the detector keeps what takes minutes to learn: arrays by name, no pickles, bounded."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILE_BYTES_MAX = 64 << 20          # ten thousand replicas take 3 MB

Arrays = Mapping[str, npt.NDArray[Any]]  # Any: of figures or of names
NO_ARRAYS: Arrays = {}


def read_state(path: Path) -> tuple[Arrays, str]:
    """The arrays of a file, and what is wrong with it; nothing of a file that is not there, which is no trouble."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return NO_ARRAYS, f"{path} is larger than {FILE_BYTES_MAX} bytes, and is not read"
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:  # it closes no file that is broken
            return {name: file[name] for name in file.files}, ""
    except FileNotFoundError:
        return NO_ARRAYS, ""
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        return NO_ARRAYS, f"{path} cannot be read, and all is learnt anew: {error}"


def write_state(path: Path, arrays: Arrays) -> str:
    """Replace the file; what went wrong, or nothing. Names may hold slashes."""
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(arrays))
            file.flush()
            os.fsync(file.fileno())
        if draft.stat().st_size > FILE_BYTES_MAX:
            draft.unlink()
            return f"what was learnt takes more than {FILE_BYTES_MAX} bytes, and is not kept"
        draft.replace(path)
    except OSError as error:
        return f"what was learnt is not kept in {path}: {error.strerror or error}"
    return ""
