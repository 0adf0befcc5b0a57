"""A process that reads GPUs as the agent does and says what it sees: one JSON line for each line on its stdin.

NVML is loaded once a process, from where LD_LIBRARY_PATH says: so each test has a reader of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys

from enova_agent.gpu import NvmlGpus


def main() -> None:
    """Reads `describe` and `sample`, until the end of stdin; `ours` are pids of engines, from the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    deadline_s, ours = float(sys.argv[1]), {int(pid) for pid in sys.argv[2:]}
    gpus = NvmlGpus(is_ours=ours.__contains__, deadline_s=deadline_s)
    gpus.start(timeout_s=5.0)
    for _ in sys.stdin:
        value = {
            "samples": [dataclasses.asdict(sample) for sample in gpus.sample()],
            "facts": [dataclasses.asdict(facts) for facts in gpus.describe()],
            "missed_rounds": gpus.missed_rounds,
        }
        print(json.dumps(value), flush=True)
    gpus.close()


if __name__ == "__main__":
    main()
