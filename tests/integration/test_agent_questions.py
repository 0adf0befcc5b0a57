"""What waits to be told to an agent is bounded, whatever the agent says."""

from __future__ import annotations

from enova_coordinator.agents import QUESTIONS_MAX, AgentSession, Cancelled, LogLines


async def test_chunks_that_nobody_asked_for_take_no_memory() -> None:
    session = AgentSession(node="nodes/n", uid="u", instance="i", now_s=lambda: 0.0)
    for number in range(10 * QUESTIONS_MAX):
        session.log_lines(f"unknown-{number}", LogLines(("line",)))
    assert len(await session.next()) == QUESTIONS_MAX
    session.log_lines("unknown", LogLines(("line",)))
    session.log_lines("unknown", LogLines(("line",)))
    assert await session.next() == [Cancelled("unknown")]
