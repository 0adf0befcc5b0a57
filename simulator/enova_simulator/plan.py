"""Recommend and simulate without a coordinator: JSON in, JSON out; and the catalogue's facts.

`python -m enova_simulator.plan recommend` reads a `RecommendConfigurationRequest` as JSON from standard input and
writes the response that the API would give. `python -m enova_simulator.plan simulate` reads what `enova simulate` asks:
`{"deployment": {...}, "trace": PATH, "fleet": {TYPE: COUNT}, "policies": [...], "start_up_s": 120, "seed": 1000,
"lengths": [[PROMPT, OUTPUT], ...], "allow_gaps": false}`. `python -m enova_simulator.plan replay` reads what
`enova replay` asks: `{"situations": PATH, "policy": "", "conservatism": null}`. What is wrong with a request is one
JSON object on standard error, exit code 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TextIO

from enova_recommender import catalog
from enova_recommender.memory import weight_bytes
from enova_recommender.recommend.respond import Problem, respond
from enova_recommender.shape import write_shape

SEED = 1000
START_UP_S = 120.0


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
        _refuse(found)
    return found


def simulate(text: str) -> dict[str, object]:
    """What a deployment would do on a fleet under a trace; what is wrong with the question ends the process."""
    plain = json.loads(text)
    try:
        # Compiled engines take seconds to load: who only recommends does without.
        from enova_common.traces import Scenario, TraceError
        from enova_simulator.cluster.setup import SetupError
        from enova_simulator.cluster.trace import read
        from enova_simulator.cluster.what_if import Asked, what_if
        from enova_simulator.least import least
    except ImportError as error:
        _refuse(Problem(field="", message=f"simulating needs {error.name}", remedy="pip install 'enova[simulator]'"))
    try:
        pairs = tuple((int(prompt), int(output)) for prompt, output in plain.get("lengths") or ())
        path = Path(plain["trace"])
        with _opened(path) as lines:
            rows = read(
                lines, scenario=Scenario(lengths=pairs) if pairs else None, seed=plain.get("seed", SEED),
                allow_gaps=plain.get("allow_gaps", False),
            )  # fmt: skip
        start_up_s = plain.get("start_up_s", START_UP_S)
        answer = what_if(Asked(
            deployment=plain["deployment"], rows=rows, fleet=plain["fleet"], policies=tuple(plain.get("policies", ())),
            start_up_s=start_up_s, seed=plain.get("seed", SEED),
        ))  # fmt: skip
        bounds = plain["deployment"]
        return answer | {"least": least(
            rows.arrival_s, answer, start_up_s=start_up_s,
            min_replicas=bounds.get("replicas") or bounds.get("min") or 0,
            max_replicas=bounds.get("replicas") or bounds.get("max"),
        )}  # fmt: skip
    except TraceError as error:
        _refuse(Problem(field="trace", message=f"line {error.line}: {error.message}"))
    except SetupError as error:
        _refuse(Problem(field=error.field, message=error.message))
    except (OSError, UnicodeDecodeError) as error:
        _refuse(Problem(field="trace", message=f"cannot be read: {error}"))


def replay(text: str) -> dict[str, object]:
    """What a policy wishes for in recorded situations; what is wrong with the question ends the process."""
    # The recorded situations bring the coordinator's core, which who only recommends does without.
    from enova_common.errors import Corrupt
    from enova_coordinator.core.recording import read_lines
    from enova_simulator.replay import Asked, ReplayError
    from enova_simulator.replay import replay as answered

    plain = json.loads(text)
    try:
        asked = Asked(policy=plain.get("policy") or "", conservatism=plain.get("conservatism"))
        with _opened(Path(plain["situations"])) as lines:
            return answered(read_lines(lines), asked)
    except ReplayError as error:
        _refuse(Problem(field=error.field, message=error.message, remedy=error.remedy))
    except Corrupt as error:
        _refuse(Problem(field="situations", message=error.message, remedy=error.remedy))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        _refuse(Problem(field="situations", message=f"cannot be read: {error}"))


def _opened(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _refuse(problem: Problem) -> NoReturn:
    sys.stderr.write(json.dumps(asdict(problem)) + "\n")
    raise SystemExit(1)


ANSWERS = {"recommend": recommend, "simulate": simulate, "replay": replay}


def main(words: Sequence[str] | None = None) -> None:
    """Write what was asked for to standard output as JSON."""
    parser = argparse.ArgumentParser(prog="python -m enova_simulator.plan", description=__doc__)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "command", nargs="?", choices=sorted(ANSWERS), help="answer the request on standard input"
    )
    asked.add_argument("--gpus", action="store_true", help="known GPU types")
    asked.add_argument("--models", action="store_true", help="known models")
    options = parser.parse_args(words)
    if options.command is not None:
        found: object = ANSWERS[options.command](sys.stdin.read())
    else:
        found = gpu_facts() if options.gpus else model_facts()
    json.dump(found, sys.stdout)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
