"""Shell completion: the scripts are what each shell takes, and what they ask the command is answered."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from enova_testing.fleet import ENOVA, run_enova

pytestmark = [pytest.mark.network]

SHELLS = ("bash", "zsh", "fish")
REGISTERS = {
    "bash": "complete -o nosort -F", "zsh": "#compdef enova", "fish": "complete --no-files --command enova",
}  # fmt: skip
AT = {"bash": "2", "zsh": "2", "fish": "dep"}  # how each says which word is to be completed


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_registers_the_command_and_asks_it(shell: str) -> None:
    result = run_enova("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert REGISTERS[shell] in result.out
    assert f"_ENOVA_COMPLETE={shell}_complete" in result.out
    if program := shutil.which(shell):
        checked = subprocess.run([program, "-n"], input=result.out, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
def test_what_the_script_asks_is_answered_with_what_can_follow(shell: str) -> None:
    asked = {"COMP_WORDS": "enova get dep", "COMP_CWORD": AT[shell], "_ENOVA_COMPLETE": f"{shell}_complete"}
    answer = subprocess.run([str(ENOVA)], env={**os.environ, **asked}, text=True, capture_output=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "deployments" in answer.stdout
    assert "nodes" not in answer.stdout


def test_bash_itself_completes_a_command_once_the_script_is_read() -> None:
    script = """
      eval "$(enova completion bash)"
      COMP_WORDS=(enova expl) COMP_CWORD=1
      _enova_completion enova
      echo "${COMPREPLY[@]}"
    """
    path = f"{ENOVA.parent}:{os.environ['PATH']}"
    bash = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PATH": path}, text=True, capture_output=True, check=False
    )
    assert (bash.returncode, bash.stdout.strip(), bash.stderr) == (0, "explain", "")


def test_another_shell_is_a_wrong_use_that_names_the_known_ones() -> None:
    result = run_enova("completion", "tcsh")
    assert result.code == 2
    assert all(shell in result.err for shell in SHELLS)
