"""Ask AIConfigurator for the latencies of configurations: a JSON list a line on stdin, `[ttft_ms, tpot_ms]` on stdout.

Runs in an environment of its own that has the package `aiconfigurator`; null where it gives no estimate.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys

from aiconfigurator.cli.api import cli_estimate

# The package holds these configurations under other ids, and cannot fetch what it does not hold.
ALIASES = {
    "meta-llama/Llama-3.1-70B": "meta-llama/Meta-Llama-3.1-70B",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Meta-Llama-3.1-8B",
}


def estimate(line: str) -> list[float] | None:
    """The answer to one line."""
    backend, model, system, weights, experts, *numbers, cached = json.loads(line)
    isl, osl, concurrency, batch, tp, pp, dp, cut, spread = numbers
    ranks = int(float(dp or 1))
    own = float(batch or 0) or float(concurrency) / ranks
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = cli_estimate(
                ALIASES.get(model, model), system, backend_name=backend, isl=int(isl), osl=int(osl),
                batch_size=max(1, round(own)), tp_size=int(float(tp)), pp_size=int(float(pp or 1)),
                attention_dp_size=ranks, moe_tp_size=int(float(cut or 1)), moe_ep_size=int(float(spread or 1)),
                gemm_quant_mode=weights or None, moe_quant_mode=experts or None,
                kvcache_quant_mode="fp8" if cached == "fp8" else "bfloat16", database_mode="HYBRID",
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a third party's program: any failure means no estimate
            print(f"{model} {system}: {error}", file=sys.stderr)
            return None
    return [float(found.ttft), float(found.tpot)]


def main() -> None:
    """Answer all lines."""
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        print(json.dumps(estimate(line) or []), flush=True)


if __name__ == "__main__":
    main()
