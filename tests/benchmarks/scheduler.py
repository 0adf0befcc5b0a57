"""How many simulated tokens a second the scheduler computes: one replica under a Poisson load, in virtual time."""

from __future__ import annotations

import argparse
import json
import math
import random
import time

from enova_recommender import catalog
from enova_recommender.engine import Limits, Request, Scheduler, Stepped
from enova_recommender.memory import fit
from enova_recommender.performance import Roofline


def run(*, requests: int, rate: float, seed: int, coalesce: bool) -> dict[str, float]:
    """Figures of one run."""
    shape, gpu = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], catalog.gpus()["H100"]
    limits = Limits(num_blocks=fit(shape, gpu).kv_blocks)
    scheduler = Scheduler(limits, Roofline(shape, gpu), coalesce=coalesce)
    draw = random.Random(seed)
    at_s = 0.0
    for index in range(requests):
        at_s += draw.expovariate(rate)
        prompt, output = draw.randint(50, 2000), draw.randint(10, 500)
        scheduler.submit(Request(id=str(index), prompt_tokens=prompt, output_tokens=output), at_s)
    started_s = time.process_time()
    steps = [event for event in scheduler.advance(math.inf) if isinstance(event, Stepped)]
    spent_s = time.process_time() - started_s
    tokens = sum(step.count * step.made_tokens for step in steps)
    return {
        "tokens_per_cpu_s": tokens / spent_s,
        "steps_per_cpu_s": sum(step.count for step in steps) / spent_s,
        "model_s_per_cpu_s": steps[-1].end_s / spent_s,
    }


def main() -> None:
    """Measure runs in closed form beside single steps; end in one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per model second")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    figures = run(requests=options.requests, rate=options.rate, seed=options.seed, coalesce=True)
    single = run(requests=options.requests, rate=options.rate, seed=options.seed, coalesce=False)
    print(json.dumps({"bench": "scheduler", **figures, "single_steps_tokens_per_cpu_s": single["tokens_per_cpu_s"]}))


if __name__ == "__main__":
    main()
