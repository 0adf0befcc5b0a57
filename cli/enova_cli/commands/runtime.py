"""logs, restart, drain, uncordon, chat, version: working with what runs."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator

import aiohttp
import click

from enova.v1.cluster_pb2 import Node
from enova.v1.node_service_pb2 import DrainNodeRequest, UncordonNodeRequest
from enova.v1.replica_service_pb2 import RestartReplicaRequest, StreamLogsRequest, StreamLogsResponse
from enova_cli import output
from enova_cli.client import CALL_TIMEOUT_S, Client, Stubs
from enova_cli.commands.deployments import request_id
from enova_cli.commands.resources import parse_kind
from enova_cli.context import Context, output_option, pass_context
from enova_cli.endpoint import openai_url, trust
from enova_cli.plain import to_plain
from enova_common.errors import EnovaError, NotFound, Unavailable

CHAT_TIMEOUT_S = 600.0
LOG_TAIL_LINES = 100


def _named(what: str, kind: str) -> str:
    found, name = parse_kind(what if "/" in what else f"{kind}/{what}")
    if found != f"{kind}s" or not name:
        raise click.BadParameter(f"{what!r} is not a {kind}: give {kind}/NAME")
    return name


@click.command()
@click.argument("what", metavar="replica/NAME")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--tail", type=click.IntRange(min=0), default=LOG_TAIL_LINES, help="Lines from the end.")
@output_option
@pass_context
def logs(context: Context, what: str, follow: bool, tail: int) -> None:
    """Show the log of a replica's engine."""
    name = _named(what, "replica")

    async def action(client: Client) -> None:
        replica = await client.find_replica(name)

        def lines(stubs: Stubs, again: bool) -> AsyncIterable[StreamLogsResponse]:
            request = StreamLogsRequest(name=replica.name, tail_lines=0 if again else tail, follow=follow)
            return stubs.replicas.StreamLogs(request)

        if not follow:
            async for response in client.stream(lambda stubs: lines(stubs, again=False)):
                _show_lines(response, replica.name, context.form)
            return
        away = False
        async for news in client.follow(lines, endless=False):
            if news is not None:
                _show_lines(news, replica.name, context.form)
            elif not away:
                print("enova: the coordinator was away: lines of meanwhile are not shown", file=sys.stderr)
            away = news is None

    context.run(action)


def _show_lines(response: StreamLogsResponse, replica: str, form: output.Format) -> None:
    for line in response.lines:
        if form is output.Format.TABLE:
            print(line)
        else:
            output.print_line({"replica": replica, "line": line}, form)
    sys.stdout.flush()


@click.command()
@click.argument("what", metavar="replica/NAME")
@output_option
@pass_context
def restart(context: Context, what: str) -> None:
    """Restart a replica's engine: drained first, then stopped and started."""
    name = _named(what, "replica")

    async def action(client: Client) -> None:
        replica = await client.find_replica(name)
        request = RestartReplicaRequest(name=replica.name, request_id=request_id())
        result = await client.call(lambda s: s.replicas.RestartReplica(request, timeout=CALL_TIMEOUT_S))
        output.print_object("replicas", to_plain(result), context.form)

    context.run(action)


@click.command()
@click.argument("what", metavar="node/NAME")
@output_option
@pass_context
def drain(context: Context, what: str) -> None:
    """Move all replicas away from a node and place no new ones there."""
    request = DrainNodeRequest(name=f"nodes/{_named(what, 'node')}", request_id=request_id())
    _change_node(context, lambda stubs: stubs.nodes.DrainNode(request, timeout=CALL_TIMEOUT_S))


@click.command()
@click.argument("what", metavar="node/NAME")
@output_option
@pass_context
def uncordon(context: Context, what: str) -> None:
    """Let a drained node take replicas again."""
    request = UncordonNodeRequest(name=f"nodes/{_named(what, 'node')}", request_id=request_id())
    _change_node(context, lambda stubs: stubs.nodes.UncordonNode(request, timeout=CALL_TIMEOUT_S))


def _change_node(context: Context, method: Callable[[Stubs], Awaitable[Node]]) -> None:
    async def action(client: Client) -> None:
        output.print_object("nodes", to_plain(await client.call(method)), context.form)

    context.run(action)


@click.command()
@click.argument("name", metavar="SERVED_NAME")
@click.argument("message", required=False)
@click.option("--url", help="OpenAI base URL; found through the coordinator by default.")
@click.option("--max-tokens", type=int, default=256)
@click.option("--ca", default="", help="CA of the ingress's certificate.")
@output_option
@pass_context
def chat(context: Context, name: str, message: str | None, url: str | None, max_tokens: int, ca: str) -> None:
    """Talk to a model through the ingress; one message, or a conversation from the terminal."""

    async def action(client: Client) -> None:
        base = url or await openai_url(client)
        history: list[dict[str, str]] = []
        texts = iter([message]) if message is not None else _typed_lines()
        for text in texts:
            history.append({"role": "user", "content": text})
            people = context.form is output.Format.TABLE
            answer = await _ask(base, name, history, max_tokens, ca, shown=people)
            if not people:
                output.print_line({"model": name, "role": "assistant", "content": answer}, context.form)
            history.append({"role": "assistant", "content": answer})

    context.run(action)


def _typed_lines() -> Iterator[str]:
    """What a person types, or the lines of a pipe, until there is nothing more."""
    while True:
        text = (
            click.prompt("you", prompt_suffix="> ", default="") if sys.stdin.isatty() else sys.stdin.readline().strip()
        )
        if not text:
            return
        yield text


async def _ask(base: str, name: str, history: list[dict[str, str]], max_tokens: int, ca: str, *, shown: bool) -> str:
    """One streamed answer, printed as it comes where it is to be shown."""
    body = {"model": name, "messages": history, "max_tokens": max_tokens, "stream": True}
    timeout = aiohttp.ClientTimeout(total=CHAT_TIMEOUT_S)
    pieces: list[str] = []
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{base}/chat/completions", json=body, ssl=trust(ca)) as response,
        ):
            if response.status != 200:
                raise _answer_error(response.status, await response.text())
            async for raw in response.content:
                line = raw.strip()
                if line == b"data: [DONE]":
                    break
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise _answer_error(response.status, json.dumps(event))
                for choice in event.get("choices", ()):
                    pieces.append(choice.get("delta", {}).get("content") or "")
                    if shown:
                        print(pieces[-1], end="", flush=True)
            else:
                raise Unavailable("the answer broke off", reason="STREAM_CUT", remedy="ask again")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        remedy = "is the ingress running? enova get nodes shows its address"
        message = f"no answer from {base}: {error or type(error).__name__}"
        raise Unavailable(message, reason="UNREACHABLE", remedy=remedy) from error
    if shown:
        print()
    return "".join(pieces)


def _answer_error(status: int, text: str) -> EnovaError:
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = text[:200]
    if status == 404:
        return NotFound(message, remedy="enova get deployments lists what is served")
    return Unavailable(f"the ingress answered {status}: {message}", reason="NOT_SERVED")


@click.command()
@click.option("-o", "--output", "form", type=click.Choice(["table", "json", "yaml"]), default="table")
def version(form: str) -> None:
    """Print the version of this command."""
    value = importlib.metadata.version("enova")
    print(json.dumps({"version": value}) if form == "json" else value if form == "table" else f"version: {value}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell: eval "$(enova completion bash)"."""
    from click.shell_completion import get_completion_class

    cls = get_completion_class(shell)
    assert cls is not None
    print(cls(ctx.find_root().command, {}, "enova", "_ENOVA_COMPLETE").source())
