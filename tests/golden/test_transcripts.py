"""Transcripts: what a fleet does, command by command, as text that people review.

A transcript is a `.txt` beside this file. A line that begins with `> ` is a command; the lines after it are what it
printed. After a wanted change: `ENOVA_REWRITE_GOLDEN=1 pytest tests/golden`, then read the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from enova_coordinator.core.model import DeploymentSpec
from enova_coordinator.core.routes import RouteTable, next_table
from enova_testing.world import World

FOLDER = Path(__file__).parent
TRANSCRIPTS = sorted(FOLDER.glob("*.txt"))


class Session:
    """A world that is driven by lines of text."""

    def __init__(self) -> None:
        self.world = World(seed=7, nodes=0)
        self.noted = 0
        self.table = RouteTable()
        self.commands: dict[str, Callable[[list[str], dict[str, str]], list[str] | None]] = {
            "node": self.node,
            "deploy": self.deploy,
            "scale": lambda words, _: self.world.scale(words[0], int(words[1])),
            "delete": lambda words, _: self.world.delete(words[0]),
            "drain": lambda words, _: self.world.change_node(words[0], draining=True),
            "uncordon": lambda words, _: self.world.change_node(words[0], draining=False),
            "cut": lambda words, _: self.world.cut(f"nodes/{words[0]}"),
            "heal": lambda words, _: self.world.heal(f"nodes/{words[0]}"),
            "crash": lambda words, _: self.world.crash_node(f"nodes/{words[0]}"),
            "boot": lambda words, _: self.world.boot_node(f"nodes/{words[0]}"),
            "break": lambda words, _: self.world.agents[f"nodes/{words[0]}"].broken_models.add(words[1]),
            "run": self.run,
            "show": self.show,
            "routes": self.routes,
        }

    def carry_out(self, line: str) -> list[str]:
        """What a command prints."""
        name, *rest = line.split()
        words = [word for word in rest if "=" not in word]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        return self.commands[name](words, options) or []

    def node(self, words: list[str], options: dict[str, str]) -> None:
        agent = self.world.add_node(words[0], gpus=int(options.get("gpus", 4)), gpu_type=options.get("type", "H100"))
        agent.start_s, agent.drain_s = (3.0, 3.0), (2.0, 2.0)

    def deploy(self, words: list[str], options: dict[str, str]) -> None:
        numbers = {name: int(options[name]) for name in ("replicas", "min", "max") if name in options}
        configuration = {"tensor_parallel_size": int(options.get("tp", 1))}
        model = options.get("model", "m")
        spec = DeploymentSpec(
            model=model, configuration=configuration, replicas=numbers.get("replicas"), min=numbers.get("min"),
            max=numbers.get("max"),
        )
        self.world.deploy(words[0], spec)

    def run(self, words: list[str], _: dict[str, str]) -> list[str]:
        end_s = self.world.now_s + float(words[0])
        lines: list[str] = []
        while self.world.now_s < end_s:
            self.world.step()
            news = self.world.notes[self.noted:]
            lines += [f"{self.world.now_s:6.1f} {note.reason} {note.object}: {note.message}" for note in news]
            self.noted = len(self.world.notes)
        return lines

    def show(self, _: list[str], __: dict[str, str]) -> list[str]:
        lines = []
        for name in sorted(name for name in self.world.store.values if name.startswith("deployments/")):
            if name.count("/") == 1:
                lines += self._deployment(name.removeprefix("deployments/"))
        return lines or ["nothing is deployed"]

    def _deployment(self, name: str) -> list[str]:
        status = self.world.deployment(name).status
        text = f"{name} {status.state} {status.ready_replicas}/{status.target_replicas} generation"
        lines = [f"{text} {status.observed_generation}" + (f" ({status.reason})" if status.reason else "")]
        for replica in self.world.replicas(name):
            place = f"{replica.node} {' '.join(replica.gpus)}" if replica.members else "no place"
            lines.append(f"  {replica.name.rpartition('/')[2]} {replica.intent} {replica.status.state} {place}")
        return lines

    def routes(self, _: list[str], __: dict[str, str]) -> list[str]:
        self.table = next_table(self.table, self.world.snapshot())
        return [
            f"{route.served_name} -> {' '.join(target.replica for target in route.targets) or 'nobody'}"
            for route in self.table.routes.values()
        ]


def replay(text: str) -> str:
    """The transcript with what the commands print now."""
    session, lines = Session(), []
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            lines.append(line)
        elif line.startswith("> "):
            lines += [line, *session.carry_out(line.removeprefix("> "))]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_a_fleet_does_what_its_transcript_says(path: Path) -> None:
    expected = path.read_text("utf-8")
    printed = replay(expected)
    if os.environ.get("ENOVA_REWRITE_GOLDEN"):
        path.write_text(printed, "utf-8")
    else:
        assert printed == expected


def test_there_are_transcripts() -> None:
    assert len(TRANSCRIPTS) >= 5
