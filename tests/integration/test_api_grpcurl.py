"""Every call of docs/grpcurl.md, run as it stands there: by buf curl everywhere, by grpcurl where it is installed."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from enova_testing.coordinator_process import CoordinatorProcess, running_coordinator
from enova_testing.scripted_agent import ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = [pytest.mark.network, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "grpcurl.md"
CALL_TIMEOUT_S = 120.0             # a recommendation computes for seconds, and tests share their cores
WATCH_S = 5.0
# grpcurl is in no registry that tests may use: where it is not installed, buf curl speaks for it.
CLIENTS = ("buf curl", *(["grpcurl"] if shutil.which("grpcurl") else []))
# What must be in the answer of a call; of those that are not here, that it succeeds.
EXPECTED = {
    "list": "enova.v1.DeploymentService",
    "list enova.v1.DeploymentService": "ScaleDeployment",
    "Health/Check": "SERVING",
    "ListNodes": '"nodes/node-0"',
    "RecommendConfiguration": '"gpuType": "H100"',
    "CreateDeployment": '"deployments/chat"',
    "ListDeployments": '"deployments/chat"',
    "GetDeployment": '"meta-llama/Llama-3.1-8B-Instruct"',
    "ListReplicas": '"deployments/chat/replicas/v1-0"',
    "Explain": "replicas are ready",
    "UpdateDeployment": '"maxNumSeqs": 64',
    "ScaleDeployment": '"replicas": 2',
    "ListDecisions": '"user/local"',
    "WatchDeployments": '"revision"',
    "GetTelemetry": '"stepS": 1',
    "DrainNode": '"draining": true',
    "UncordonNode": '"schedulable": true',
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the page: what is asked of which symbol or method."""

    words: tuple[str, ...]             # as grpcurl takes them
    data: str
    target: str                        # list, describe or a method, with its argument

    @property
    def streams(self) -> bool:
        return "/Watch" in self.target

    @property
    def expected(self) -> str:
        return EXPECTED.get(self.target, EXPECTED.get(self.target.rpartition("/")[2], EXPECTED.get(self._short, "")))

    @property
    def _short(self) -> str:
        return self.target.removeprefix("grpc.health.v1.")


def calls() -> list[Call]:
    """The calls of the page in their order."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found = []
    for block in blocks:
        words = shlex.split(block)
        assert words[0] == "grpcurl", block
        at = words.index("127.0.0.1:7700")
        data = words[words.index("-d") + 1] if "-d" in words else ""
        found.append(Call(tuple(words), data, " ".join(words[at + 1 :])))
    return found


@pytest.fixture(scope="module")
def buf() -> str:
    setup = subprocess.run(
        [ROOT / "tests" / "tools" / "setup_buf", ROOT / ".cache" / "buf"], capture_output=True, text=True, check=True
    )
    return setup.stdout.strip()


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with running_coordinator(tmp_path) as process:
        yield process


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess) -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent(coordinator.address).connected() as connected:
        yield connected


def as_buf(buf: str, call: Call, address: str) -> list[str]:
    """The same call in buf's words."""
    base = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    if call.target == "list":
        return [*base, "--list-services", f"http://{address}"]
    if call.target.startswith("list "):
        return [*base, "--list-methods", f"http://{address}"]  # of all services
    return [*base, "-d", call.data, f"http://{address}/{call.target}"]


def as_grpcurl(call: Call, address: str) -> list[str]:
    """The call as it stands on the page, at another address."""
    return [address if word == "127.0.0.1:7700" else word for word in call.words]


def run(argv: list[str], *, streams: bool) -> str:
    """What a call printed. One that streams is ended after a while, others must succeed."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=WATCH_S if streams else CALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as expired:
        assert streams, shlex.join(argv)
        return (expired.stdout or b"").decode()
    assert streams or done.returncode == 0, f"{shlex.join(argv)}\n{done.stderr}"
    return done.stdout


async def walk(agent: ScriptedAgent, words_of: list[tuple[Call, list[str]]]) -> None:
    for call, argv in words_of:
        if call.target.endswith(("ListReplicas", "GetTelemetry")):
            await until_async(lambda: agent.running, what="the replica is assigned")
        printed = await asyncio.to_thread(run, argv, streams=call.streams)
        assert call.expected.replace(" ", "") in printed.replace(" ", ""), f"{call.target}: {printed}"


@pytest.mark.parametrize("client", CLIENTS)
async def test_each_call_works(
    coordinator: CoordinatorProcess, agent: ScriptedAgent, buf: str, client: str
) -> None:
    found = calls()
    assert len(found) >= 15
    if client == "grpcurl":
        await walk(agent, [(call, as_grpcurl(call, coordinator.address)) for call in found])
        return
    # buf curl has no describe; the symbol is looked up by reflection all the same, see below.
    asked = [call for call in found if not call.target.startswith("describe ")]
    await walk(agent, [(call, as_buf(buf, call, coordinator.address)) for call in asked])


def test_what_is_described_is_found_by_reflection(coordinator: CoordinatorProcess) -> None:
    import grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    symbols = [call.target.removeprefix("describe ") for call in calls() if call.target.startswith("describe ")]
    assert symbols
    with grpc.insecure_channel(coordinator.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        for symbol in symbols:
            assert symbol.rpartition(".")[2] in {
                each.name for each in database.FindFileContainingSymbol(symbol).message_type
            }


def test_an_error_tells_its_reason_to_buf_curl(coordinator: CoordinatorProcess, buf: str) -> None:
    call = Call((), '{"name": "deployments/absent"}', "enova.v1.DeploymentService/GetDeployment")
    done = subprocess.run(
        as_buf(buf, call, coordinator.address), capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False
    )
    error = json.loads(done.stderr)
    assert error["code"] == "not_found"
    assert error["details"][0]["type"] == "google.rpc.ErrorInfo"
