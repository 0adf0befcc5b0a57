"""Recommend without a coordinator: JSON in, JSON out; and the catalogue's facts.

`python -m enova_simulator.plan recommend` reads a `RecommendConfigurationRequest` as JSON from standard input and
writes the response that the API would give. What is wrong with a request is one JSON object on standard error, exit
code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from enova_recommender import catalog
from enova_recommender.memory import weight_bytes
from enova_recommender.recommend.respond import Problem, respond
from enova_recommender.shape import write_shape


def gpu_facts() -> list[dict[str, object]]:
    """Every known GPU type with its data sheet."""
    return [asdict(gpu) for gpu in catalog.gpus().values()]


def model_facts() -> list[dict[str, object]]:
    """Every model of the catalogue with its size and its shape, as `parse_shape` reads it back."""
    return [
        {**write_shape(shape), "parameters": shape.parameters, "weight_bytes": weight_bytes(shape)}
        for shape in catalog.models().values()
    ]


def recommend(text: str) -> dict[str, object]:
    """The answer to a request in JSON; what is wrong with one ends the process."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        plain, why = None, str(error)
    else:
        why = "it is no object"
    found = respond(plain) if isinstance(plain, dict) else Problem(field="request", message=f"is not JSON: {why}")
    if isinstance(found, Problem):
        sys.stderr.write(json.dumps(asdict(found)) + "\n")
        raise SystemExit(1)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Write what was asked for to standard output as JSON."""
    parser = argparse.ArgumentParser(prog="python -m enova_simulator.plan", description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("command", nargs="?", choices=["recommend"], help="answer the request on standard input")
    asked.add_argument("--gpus", action="store_true", help="known GPU types")
    asked.add_argument("--models", action="store_true", help="known models")
    options = parser.parse_args(words)
    if options.command is not None:
        found: object = recommend(sys.stdin.read())
    else:
        found = gpu_facts() if options.gpus else model_facts()
    json.dump(found, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
