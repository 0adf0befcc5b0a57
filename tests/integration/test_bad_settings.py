"""The real programs with settings that are wrong: exit code 1 and one clear text that names file, key and remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from enova_testing.waiting import until

pytestmark = pytest.mark.network

PROGRAMS = {
    "enova-agent": ("enova_agent", 'node = "n"\ncoordinators = ["127.0.0.1:1"]\ngpus = "none"\n'),
    "enova-ingress": ("enova_agent.ingress", ""),
    "enova-coordinator": ("enova_coordinator", ""),
}


def start(program: str, tmp_path: Path, text: str, **env: str) -> str:
    """What the program says when it ends, as it must, with exit code 1."""
    module, base = PROGRAMS[program]
    config = tmp_path / "x.toml"
    if program == "enova-ingress":
        base += f'socket = "{tmp_path}/agent.sock"\n'
    config.write_text(f'data_dir = "{tmp_path}/data"\n{base}{text}')
    words = [sys.executable, "-m", module, "--config", str(config)]
    env |= {"PATH": "/usr/bin"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30, env=env)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"{program}: ")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_wrong_key_is_told_at_once(program: str, tmp_path: Path) -> None:
    said = start(program, tmp_path, 'log_levle = "INFO"\nframe_interval_s = "often"\n')
    assert f"{tmp_path}/x.toml: log_levle: unknown key; did you mean log_level?" in said
    assert "frame_interval_s: must be a number, not a text ('often')" in said


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_file_that_is_not_toml_or_not_there_is_told(program: str, tmp_path: Path) -> None:
    assert "x.toml: not TOML" in start(program, tmp_path, "= 3\n")
    words = [sys.executable, "-m", PROGRAMS[program][0], "--config", str(tmp_path / "absent.toml")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "absent.toml: there is no such file" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_wrong_level_and_a_wrong_variable_are_told(program: str, tmp_path: Path) -> None:
    variable = program.replace("-", "_").upper() + "_LOG_LEVLE"
    assert f"{variable}: unknown variable; did you mean" in start(program, tmp_path, "", **{variable: "INFO"})
    assert "'LOUD' is not a level" in start(program, tmp_path, 'log_level = "LOUD"\n')


@pytest.mark.parametrize("program", ["enova-ingress", "enova-coordinator"])
def test_a_port_in_use_is_told(program: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = start(program, tmp_path, f'listen = "{address}"\n')
    assert address in said
    assert "in use" in said


@pytest.mark.parametrize("program", ["enova-ingress", "enova-coordinator"])
def test_plaintext_off_the_loopback_is_refused(program: str, tmp_path: Path) -> None:
    said = start(program, tmp_path, 'listen = "0.0.0.0:0"\n')
    assert "tls" in said
    assert "listen" in said


def test_a_certificate_that_is_not_there_ends_the_coordinator(tmp_path: Path) -> None:
    table = f'[tls]\nca = "{tmp_path}/ca.crt"\ncert = "{tmp_path}/x.crt"\nkey = "{tmp_path}/x.key"\n'
    assert f"{tmp_path}/x.crt: No such file or directory" in start("enova-coordinator", tmp_path, table)


def test_a_certificate_that_is_not_there_keeps_the_agent_from_the_coordinator_alone(tmp_path: Path) -> None:
    """Its engines are to be adopted and watched all the same, and the file may come."""
    table = f'[tls]\nca = "{tmp_path}/ca.crt"\ncert = "{tmp_path}/x.crt"\nkey = "{tmp_path}/x.key"\n'
    config = tmp_path / "x.toml"
    config.write_text(f'data_dir = "{tmp_path}/data"\n{PROGRAMS["enova-agent"][1]}{table}')
    log = tmp_path / "log"
    with log.open("w") as stderr:
        agent = subprocess.Popen([sys.executable, "-m", "enova_agent", "--config", str(config)], stderr=stderr)
        try:
            until(lambda: f"{tmp_path}/x.crt: No such file or directory" in log.read_text(), timeout_s=30)
            assert agent.poll() is None
        finally:
            agent.terminate()
            agent.wait(20)
