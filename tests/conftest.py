"""Rules for the whole run: a printed seed that can be given again, and no unexpected skip in CI."""

from __future__ import annotations

import os
import random
from pathlib import Path

import hypothesis
import pytest

from enova_testing.examples import examples

# In CI the examples are always the same ones, so that a change is judged by what it changes; elsewhere they roam.
hypothesis.settings.register_profile("enova", parent=examples(), derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("enova")

ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"
SEED_VARIABLE = "ENOVA_TEST_SEED"
UNEXPECTED_SKIP = 7  # exit status: tests failed, and others were skipped that may not be


def pytest_configure(config: pytest.Config) -> None:
    """Draws the seed of the run, or takes the given one."""
    given = os.environ.get(SEED_VARIABLE)
    # Kept in the environment so that processes which the tests start draw from the same.
    os.environ[SEED_VARIABLE] = given or str(random.SystemRandom().randrange(2**31))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How to replay the run, where somebody will want to."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"replay with {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}")


@pytest.fixture
def seed() -> int:
    """The seed of the run, for tests that draw."""
    return int(os.environ[SEED_VARIABLE])


def allowed_skips() -> list[tuple[str, str]]:
    """The skips that CI accepts: (beginning of the test's id, reason why)."""
    lines = [line.strip() for line in ALLOWED_SKIPS.read_text().splitlines()]
    entries = [line.partition(" # ") for line in lines if line and not line.startswith("#")]
    return [(test.strip(), reason.strip()) for test, _, reason in entries]


def unexpected_skips(skipped: list[str], allowed: list[tuple[str, str]]) -> list[str]:
    """The ids of skipped tests that no entry allows."""
    return [test for test in skipped if not any(test.startswith(prefix) for prefix, _ in allowed)]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With CI=true a skip that is not in the list fails the run: a test that never runs protects nothing."""
    if os.environ.get("CI") != "true":
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    skipped = [report.nodeid for report in reporter.stats.get("skipped", [])]
    unexpected = unexpected_skips(skipped, allowed_skips())
    for test in unexpected:
        reporter.write_line(f"unexpected skip: {test} (see tests/allowed_skips.txt)", red=True)
    if unexpected and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    elif unexpected and exitstatus == pytest.ExitCode.TESTS_FAILED:
        session.exitstatus = UNEXPECTED_SKIP  # a second try of the failed tests must not make up for it
