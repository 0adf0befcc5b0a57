"""Recommend and simulate without a coordinator: JSON in, JSON out. First: the catalogue's facts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from enova_recommender import catalog
from enova_recommender.memory import weight_bytes


def gpu_facts() -> list[dict[str, object]]:
    """Every known GPU type with its data sheet."""
    return [asdict(gpu) for gpu in catalog.gpus().values()]


def model_facts() -> list[dict[str, object]]:
    """Every model of the catalogue with its shape and size."""
    return [
        {**asdict(shape), "parameters": shape.parameters, "weight_bytes": weight_bytes(shape)}
        for shape in catalog.models().values()
    ]


def main(words: Sequence[str] | None = None) -> None:
    """Write what was asked for to standard output as one JSON array."""
    parser = argparse.ArgumentParser(prog="python -m enova_simulator.plan", description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--gpus", action="store_true", help="known GPU types")
    asked.add_argument("--models", action="store_true", help="known models")
    options = parser.parse_args(words)
    json.dump(gpu_facts() if options.gpus else model_facts(), sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
