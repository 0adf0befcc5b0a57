"""startup: how long `enova up` takes to be ready, and `delete` to free every process.

Keys: `up_ready_s` (from the command to its line: coordinator, 2 nodes of 8 simulated H100, all registered),
`delete_s` (from `enova delete` of a deployment of 8 replicas until no engine process is left), medians over the
rounds. Raw results in `--out`: rounds.csv.gz with `round,up_ready_s,ready_s,delete_s,stop_s`, real seconds;
`ready_s` is from apply to 8 replicas READY and routed, `stop_s` from SIGINT to the end of `up`. `--data` is not used.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil

from enova_testing.fleet import start_up
from enova_testing.waiting import until

ROUNDS = 5
REPLICAS = 8


@dataclass(frozen=True, slots=True)
class Round:
    """One fleet, from nothing to nothing; real seconds."""

    round: int
    up_ready_s: float
    ready_s: float
    delete_s: float
    stop_s: float


def run_round(index: int, directory: Path) -> Round:
    """Bring a fleet up, deploy, delete, stop."""
    began = time.monotonic()
    fleet = start_up(directory, ("--nodes", "2", "--gpu", "H100:8", "--time-scale", "20"))
    up_ready = time.monotonic() - began
    began = time.monotonic()
    fleet.deploy("bench", replicas=REPLICAS)
    ready = time.monotonic() - began
    engines = [psutil.Process(replica["pid"]) for replica in fleet.replicas("bench")]
    engines += [child for engine in engines for child in engine.children(recursive=True)]
    began = time.monotonic()
    fleet.ok("delete", "deployment/bench", "--no-wait")
    until(lambda: not any(engine.is_running() for engine in engines), timeout_s=60.0)
    delete = time.monotonic() - began
    began = time.monotonic()
    fleet.stop()
    return Round(index, up_ready, ready, delete, time.monotonic() - began)


def main() -> None:
    """Run the rounds, print a table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="not used")
    parser.add_argument("--seed", type=int, default=1000, help="not used: nothing is drawn")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="enova-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    rounds = []
    for index in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="enova-startup-") as directory:
            rounds.append(run_round(index, Path(directory) / "data"))
        print("  ".join(f"{key} {value:6.2f}" for key, value in asdict(rounds[-1]).items()))
    with gzip.open(out / "rounds.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rounds[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rounds)
    figures = {
        "up_ready_s": round(statistics.median(row.up_ready_s for row in rounds), 3),
        "delete_s": round(statistics.median(row.delete_s for row in rounds), 3),
        "up_ready_s_max": round(max(row.up_ready_s for row in rounds), 3),
        "delete_s_max": round(max(row.delete_s for row in rounds), 3),
        "rounds": len(rounds),
        "notes": {},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
