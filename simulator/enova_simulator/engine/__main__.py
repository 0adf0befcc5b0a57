"""`enova-simulated-engine`: takes the place of `vllm serve` where there is no GPU."""

from __future__ import annotations

import json
import logging
import signal
import sys

from enova_common.vllm import ExitCode
from enova_simulator.engine.command_line import parse_options

log = logging.getLogger(__name__)


def main() -> None:
    """Run one engine until it ends; the exit codes are vLLM's."""
    options = parse_options(sys.argv[1:])
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="(APIServer pid=%(process)d) %(levelname)s %(asctime)s [simulated] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(ExitCode.INTERRUPTED_START))
    # Heavy imports come after the parser, so that a usage error is quick.
    import uvloop

    from enova_simulator.engine.faults import read_faults
    from enova_simulator.engine.model import StartRefused, load
    from enova_simulator.engine.server import Server, bind

    try:
        faults = read_faults(options.faults) if options.faults else ()
    except (OSError, ValueError, json.JSONDecodeError) as error:
        log.critical("--simulated-faults %s: %s", options.faults, error)
        sys.exit(ExitCode.USAGE)
    try:
        listener = bind(options.host, options.port)
        served = load(options)

        async def run() -> int:
            return await Server(options, served, listener, faults).run()

        code = uvloop.run(run())
    except StartRefused as error:
        log.critical("%s", error)
        sys.exit(ExitCode.FAILED_START)
    sys.exit(code)


if __name__ == "__main__":
    main()
