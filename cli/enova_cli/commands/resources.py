"""get, describe, events, verdicts: what there is."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sequence
from typing import Any

import click
from google.protobuf.message import Message

from enova_cli import output
from enova_cli.client import Client, Stubs
from enova_cli.context import Context, output_option, pass_context
from enova_cli.live_text import live_capacity, live_line
from enova_cli.plain import to_plain
from enova_cli.step_text import calibration_line
from enova_common.errors import NotFound

EVENTS_SHOWN_MAX = 4096  # remembered while following, so that none is shown twice after an outage

Listing = Callable[[Client], Awaitable[Sequence[Message]]]

KINDS: dict[str, Listing] = {
    "deployments": lambda client: client.list_deployments(),
    "replicas": lambda client: client.list_replicas(),
    "nodes": lambda client: client.list_nodes(),
    "variants": lambda client: client.list_variants(),
    "decisions": lambda client: client.list_decisions(),
    "verdicts": lambda client: client.list_verdicts(),
    "episodes": lambda client: client.list_episodes(),
    "events": lambda client: client.list_events(),
}


def parse_kind(text: str) -> tuple[str, str]:
    """KIND or KIND/NAME, singular or plural, as (plural kind, name or "")."""
    word, _, name = text.partition("/")
    kind = word if word.endswith("s") else f"{word}s"
    if kind not in KINDS:
        raise click.BadParameter(f"unknown kind {word!r}: one of {', '.join(KINDS)}")
    return kind, name


def complete_kind(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Shell completion of a kind."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


async def find(client: Client, kind: str, name: str) -> dict[str, Any]:
    """One object of a kind by its short or full name. Raises NotFound."""
    if kind == "replicas":
        return to_plain(await client.find_replica(name))
    if kind == "deployments":
        try:
            return to_plain(await client.get_deployment(f"deployments/{name.removeprefix('deployments/')}"))
        except NotFound as error:
            error.remedy = error.remedy or "enova get deployments lists them"
            raise
    for message in await KINDS[kind](client):
        plain = to_plain(message)
        full = str(plain.get("name") or plain.get("object"))
        if name in (full, output.short(full)) or full.rsplit("/", 1)[-1] == name:
            return plain
    raise NotFound(f"no {kind.removesuffix('s')} {name!r}", remedy=f"enova get {kind} lists them")


@click.command()
@click.argument("what", metavar="KINDS|KIND/NAME", shell_complete=complete_kind)
@output_option
@pass_context
def get(context: Context, what: str) -> None:
    """Show all objects of a kind, or one: enova get replicas, enova get deployment/chat."""
    kind, name = parse_kind(what)

    async def action(client: Client) -> None:
        if name:
            output.print_object(kind, await find(client, kind, name), context.form)
        else:
            output.print_objects(kind, [to_plain(m) for m in await KINDS[kind](client)], context.form)

    context.run(action)


@click.command()
@click.argument("what", metavar="KIND/NAME", shell_complete=complete_kind)
@output_option
@pass_context
def describe(context: Context, what: str) -> None:
    """Show everything of one object, field by field, with its newest events."""
    kind, name = parse_kind(what)
    if not name:
        raise click.UsageError(f"which one? enova describe {kind.removesuffix('s')}/NAME")

    async def action(client: Client) -> None:
        plain = await find(client, kind, name)
        live = await live_capacity(client, str(plain["name"])) if kind == "deployments" else None
        if context.form is not output.Format.TABLE:
            output.print_object(kind, plain | ({"live_capacity": live} if live is not None else {}), context.form)
            return
        output.print_description({key: value for key, value in plain.items() if kind != "episodes" or key != "series"})
        if live is not None:
            print(live_line(live))
            await _describe_steps(client, str(plain["name"]))
        events = [to_plain(event) for event in await client.list_events(str(plain.get("name", "")))]
        output.print_objects("events", events[:10], context.form)

    context.run(action)


async def _describe_steps(client: Client, name: str) -> None:
    """What live engines taught of the step times of a deployment's variants."""
    from enova.v1.breakdown_service_pb2 import GetBreakdownRequest
    from enova_cli.client import CALL_TIMEOUT_S

    request = GetBreakdownRequest(name=name)
    answer = await client.call(lambda s: s.breakdowns.GetBreakdown(request, timeout=CALL_TIMEOUT_S))
    for steps in answer.steps:
        if steps.HasField("calibration"):
            print(f"{steps.variant.rpartition('/')[2]}: {calibration_line(steps.calibration)}")


@click.command()
@click.argument("what", metavar="[KIND/NAME]", required=False, default="", shell_complete=complete_kind)
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on.")
@output_option
@pass_context
def events(context: Context, what: str, follow: bool) -> None:
    """Show what happened, oldest first."""

    async def action(client: Client) -> None:
        name = ""
        if what:
            kind, short_name = parse_kind(what)
            name = str((await find(client, kind, short_name))["name"])
        if follow:
            await _follow(client, name, context.form)
        else:
            past = [to_plain(event) for event in reversed(await client.list_events(name))]
            output.print_objects("events", past, context.form)

    context.run(action)


async def _follow(client: Client, name: str, form: output.Format) -> None:
    """What is remembered, then what happens; after an outage first what is remembered of meanwhile."""
    from enova.v1.decision_service_pb2 import WatchEventsRequest, WatchEventsResponse

    revision = 0
    shown: deque[tuple[str, str]] = deque(maxlen=EVENTS_SHOWN_MAX)

    def show(events: Iterable[Message]) -> None:
        fresh = [plain for plain in map(to_plain, events) if (plain["name"], plain["create_time"]) not in shown]
        shown.extend((plain["name"], plain["create_time"]) for plain in fresh)
        if fresh and form is output.Format.TABLE:
            output.print_objects("events", fresh, form)
        for plain in fresh if form is not output.Format.TABLE else ():
            output.print_line(plain, form)
        sys.stdout.flush()

    async def show_past() -> None:
        nonlocal revision
        past, revision = await client.list_events_to(name)
        show(reversed(past))

    def watched(stubs: Stubs, _again: bool) -> AsyncIterable[WatchEventsResponse]:
        return stubs.decisions.WatchEvents(WatchEventsRequest(object=name, resume_revision=revision))

    await show_past()
    async for response in client.follow(watched, endless=True):
        if response is None:
            await show_past()
        else:
            show(response.events)


@click.command()
@click.argument("what", metavar="KIND/NAME", shell_complete=complete_kind)
@output_option
@pass_context
def explain(context: Context, what: str) -> None:
    """Say why an object is as it is: state, target, what is waited for, decisions with their figures."""
    from enova.v1.decision_service_pb2 import ExplainRequest
    from enova_cli.client import CALL_TIMEOUT_S

    kind, name = parse_kind(what)
    if not name:
        raise click.UsageError(f"which one? enova explain {kind.removesuffix('s')}/NAME")

    async def action(client: Client) -> None:
        full = str((await find(client, kind, name))["name"])
        request = ExplainRequest(name=full)
        response = await client.call(lambda s: s.decisions.Explain(request, timeout=CALL_TIMEOUT_S))
        if context.form is not output.Format.TABLE:
            live = {"live_capacity": await live_capacity(client, full)} if kind == "deployments" else {}
            output.print_object(kind, to_plain(response) | live, context.form)
            return
        print(f"{output.short(response.name)} is {response.state}")
        for sentence in response.sentences:
            print(f"  {sentence}")
        for decision in response.decisions:
            plain = to_plain(decision)
            print(
                f"  {plain['create_time']} {plain['action']} {plain['from_replicas']} -> {plain['to_replicas']}"
                f" by {plain['actor']}: {plain['reason']}"
            )

    context.run(action)
