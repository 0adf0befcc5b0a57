"""What every benchmark of figures shares: its three arguments, its data, its raw results, its table and its last line.

A benchmark is a script in `tests/benchmarks`. It parses `--data DIR --seed N --out DIR`, reads sets out of DIR (by
default the samples in `tests/samples`), writes what its figures are computed from as CSV under `--out`, prints a table
for people, and ends in one line of JSON. A figure that could not be computed is null, and `notes` says why.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

SAMPLES = Path(__file__).parent.parent / "samples"
SEED = 1000            # seeds below are for tuning
RESAMPLES = 2000       # of a bootstrap
TABLE_WIDTH = 160      # characters

Floats = npt.NDArray[np.float64]


@dataclass(slots=True, kw_only=True)
class Benchmark:
    """One run: where it reads and writes, its seed, and what it has to say."""

    name: str
    data: Path
    out: Path
    seed: int
    full: bool                 # FULL=1: more seeds, traces and days
    notes: dict[str, str] = field(default_factory=dict)

    def files(self, folder: str, pattern: str) -> list[Path]:
        """The files of one set, sorted; none, and a note, if the set is absent."""
        found = sorted((self.data / folder).glob(pattern))
        if not found:
            self.notes[folder] = f"no {pattern} in the data folder: left out"
        return found

    def write(self, name: str, rows: Iterable[Mapping[str, object]]) -> Path:
        """Raw results as NAME.csv.gz under the output folder; rows all have the keys of the first."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{name}.csv.gz"
        listed = list(rows)
        with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(listed[0]) if listed else ["empty"])
            writer.writeheader()
            writer.writerows(listed)
        return path

    def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """One table for people."""
        if not rows:
            return
        table = Table(title=title, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*(shown(row.get(column)) for column in rows[0]))
        Console(width=TABLE_WIDTH).print(table)

    def end(self, figures: Mapping[str, object]) -> None:
        """The last line: the figures, where the raw results lie, and the notes."""
        line = {"bench": self.name, "seed": self.seed, **figures, "out": str(self.out), "notes": self.notes}
        print(json.dumps(_plain(line), allow_nan=False), flush=True)


def benchmark(name: str, description: str | None) -> Benchmark:
    """The run that the command line asks for."""
    parser = argparse.ArgumentParser(prog=name, description=description)
    parser.add_argument("--data", type=Path, default=SAMPLES, help="sets of public data, a folder each")
    parser.add_argument("--seed", type=int, default=SEED, help="the first of the seeds that are used")
    parser.add_argument("--out", type=Path, default=None, help="where raw results go (default: a temporary folder)")
    options = parser.parse_args()
    if not options.data.is_dir():
        parser.error(f"--data {options.data} is no folder")
    out = options.out or Path(tempfile.mkdtemp(prefix=f"enova-{name}-"))
    return Benchmark(
        name=name, data=options.data, out=out, seed=options.seed, full=os.environ.get("FULL", "") == "1"
    )


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV file, gz or plain."""
    opened: io.TextIOBase
    with (gzip.open(path, "rt", encoding="utf-8", newline="") if path.suffix == ".gz"
          else path.open(encoding="utf-8", newline="")) as opened:
        yield from csv.DictReader(opened)


def ape(predicted: Floats, measured: Floats) -> Floats:
    """Absolute errors as shares of what was measured."""
    return np.abs(predicted - measured) / measured


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float] | None:
    """The interval of a proportion (Wilson 1927), by default of 95 %; None without trials."""
    if trials == 0:
        return None
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return middle - half, middle + half


def bootstrap(
    differences: Floats, *, seed: int, statistic: Callable[[Floats], float] = lambda sample: float(np.mean(sample))
) -> tuple[float, float]:
    """The 95 % interval of a statistic of paired differences, by resampling the pairs."""
    draw = np.random.default_rng(seed)
    picks = draw.integers(0, len(differences), size=(RESAMPLES, len(differences)))
    values = np.array([statistic(differences[pick]) for pick in picks])
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def shown(value: object) -> str:
    """One cell: four significant digits, a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: object) -> object:
    """What JSON can carry: numpy's scalars as Python's, what is not finite as null."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
