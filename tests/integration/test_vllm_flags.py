"""enova_common.vllm against the vLLM that is installed: its own parser takes our flags, values and command lines."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from enova_agent.core.command import EngineCommand, build, flags
from enova_agent.core.model import Claim, FlagValue, MemberSpec
from enova_common.vllm import DEFAULTS, FLAGS, FlagKind

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(300)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
START_TIMEOUT_S = 240.0  # importing vLLM takes 10 s alone, a minute beside other tests on two cores
WORDS = ("python", "-m", "vllm.entrypoints.openai.api_server")

# Runs in vLLM's environment: parses each command line of a JSON list and says what became of it.
PARSE = """
import contextlib, io, json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
options = {word: action for action in parser._actions for word in action.option_strings}
answers = []
for words in json.load(sys.stdin):
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            parsed = vars(parser.parse_args(words))
    except SystemExit:
        answers.append({"refused": refusal.getvalue().strip().splitlines()[-1]})
    else:
        answers.append({"parsed": parsed})
choices = {word: [str(choice) for choice in action.choices or ()] for word, action in options.items()}
json.dump({"answers": answers, "choices": choices}, open(sys.argv[1], "w"), default=str)
"""

PLAIN_VALUES: dict[FlagKind, FlagValue] = {
    FlagKind.INTEGER: 2, FlagKind.NUMBER: 0.5, FlagKind.TEXT: "auto", FlagKind.BOOLEAN: True,
}  # fmt: skip


def allowed_values() -> list[tuple[str, FlagValue]]:
    """For each flag its default, its bounds where they are finite, each choice, both booleans."""
    values: list[tuple[str, FlagValue]] = []
    for name, flag in FLAGS.items():
        match flag.kind:
            case FlagKind.CHOICE:
                values += [(name, choice) for choice in flag.choices]
            case FlagKind.BOOLEAN:
                values += [(name, True), (name, False)]
            case FlagKind.TEXT:
                values.append((name, "fp8" if name == "quantization" else "dummy"))
            case FlagKind.INTEGER:
                values += [(name, int(flag.minimum)), (name, int(flag.maximum))]
            case FlagKind.NUMBER:
                values += [(name, flag.minimum), (name, flag.maximum)]
        default = DEFAULTS[name]
        if default is not None and (name, default) not in values:
            values.append((name, default))
    return values


@pytest.fixture(scope="module")
def member() -> MemberSpec:
    """A member that uses every flag of the list at once."""
    configuration = {
        name: flag.choices[0] if flag.kind is FlagKind.CHOICE else PLAIN_VALUES[flag.kind]
        for name, flag in FLAGS.items()
    }
    return MemberSpec(
        replica="deployments/chat/replicas/v1-0", uid="u", model="/models/tiny", served_names=("chat", "adapter"),
        configuration=configuration, claims=(Claim(gpu_uuid="GPU-1"),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def command(member: MemberSpec) -> tuple[str, ...]:
    """What the agent would start, without the program."""
    engine = EngineCommand(words=WORDS, extra_arguments=("--host", "0.0.0.0", "--dtype", "float32"))
    built = build(member, engine, port=4321, token="t", record="{}", gpu_types={}, ambient={})
    return built.argv[len(WORDS):]  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(command: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's parser makes of them all, asked in one process: the import is what takes long."""
    lines = [[*flags({name: value})] for name, value in allowed_values()]
    lines += [list(command), ["--no-such-flag"], ["--max-num-seqs", "many"], []]
    answer = tmp_path_factory.mktemp("flags") / "answer.json"
    python = str(ENVIRONMENT / "bin" / "python")
    done = subprocess.run(
        [python, "-W", "ignore", "-c", PARSE, str(answer)], input=json.dumps(lines),
        capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    facts: dict[str, Any] = json.loads(answer.read_text())
    return facts


def test_every_flag_and_each_allowed_value_is_taken_as_it_was_meant(verdicts: dict[str, Any]) -> None:
    wrong = []
    for (name, value), answer in zip(allowed_values(), verdicts["answers"], strict=False):
        parsed = answer.get("parsed", {}).get(name, answer.get("refused"))
        if parsed != value:
            wrong.append((name, value, parsed))
    assert not wrong


def test_what_the_agent_builds_is_taken_and_its_own_words_win(
    verdicts: dict[str, Any], member: MemberSpec
) -> None:
    answer = verdicts["answers"][-4]
    assert "refused" not in answer
    parsed = answer["parsed"]
    assert (parsed["host"], parsed["port"], parsed["shutdown_timeout"]) == ("127.0.0.1", 4321, 9)
    assert parsed["served_model_name"] == list(member.served_names)
    assert parsed["model"] == member.model
    assert parsed["max_num_seqs"] == 2


def test_defaults_are_vllm_s_own_where_it_has_any(verdicts: dict[str, Any]) -> None:
    parsed = verdicts["answers"][-1]["parsed"]
    own = {name: parsed[name] for name in FLAGS if parsed[name] is not None}
    assert len(own) > 10
    assert own == {name: DEFAULTS[name] for name in own}


def test_a_flag_or_value_that_vllm_does_not_know_is_refused_here_as_well(verdicts: dict[str, Any]) -> None:
    # The counter-example: without it the tests above would pass on a parser that takes anything.
    unknown, wrong = verdicts["answers"][-3:-1]
    assert "unrecognized arguments" in unknown["refused"]
    assert "invalid int value" in wrong["refused"]


def test_choices_are_among_those_that_vllm_lists(verdicts: dict[str, Any]) -> None:
    for flag in FLAGS.values():
        if flag.choices:
            assert set(flag.choices) <= set(verdicts["choices"][flag.option]), flag.name
