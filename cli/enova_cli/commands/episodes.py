"""episodes: what befell replicas and deployments, what it rested on, and what a person says of it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterable, Iterable
from pathlib import Path
from typing import Any

import click

from enova.v1.verdict_service_pb2 import (
    Episode,
    GetEpisodeRequest,
    LabelEpisodeRequest,
    ListEpisodesRequest,
    WatchEpisodesRequest,
    WatchEpisodesResponse,
)
from enova_cli import output
from enova_cli.client import CALL_TIMEOUT_S, Client, Stubs
from enova_cli.context import Context, output_option, pass_context
from enova_cli.plain import to_plain
from enova_common.errors import NotFound

KIND = "episodes"
_WORDS = {"true": Episode.LABEL_TRUE, "false": Episode.LABEL_FALSE, "none": Episode.LABEL_UNSPECIFIED}


@click.group(invoke_without_command=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what changes from now on.")
@click.option("--open", "only_open", is_flag=True, help="Those that are not over.")
@click.option("--uncertain", is_flag=True, help="Those first of which a label would teach most.")
@click.option("--of", "what", metavar="KIND/NAME", default="", help="Of one deployment, replica or node.")
@output_option
@click.pass_context
def episodes(ctx: click.Context, follow: bool, only_open: bool, uncertain: bool, what: str) -> None:
    """Show episodes, newest first: which object, since when, what is the matter, what is suggested."""
    context: Context = ctx.obj
    if ctx.invoked_subcommand is not None:
        return
    if follow and uncertain:
        raise click.UsageError("--follow tells of changes as they come: --uncertain orders a list")

    async def action(client: Client) -> None:
        request = ListEpisodesRequest(
            object=await _object(client, what),
            state=Episode.STATE_OPEN if only_open else Episode.STATE_UNSPECIFIED,
            order=ListEpisodesRequest.ORDER_UNCERTAIN if uncertain else ListEpisodesRequest.ORDER_UNSPECIFIED,
        )
        if follow:
            await _follow(client, request, context.form)
        else:
            output.print_objects(KIND, [to_plain(each) for each in await client.list_episodes(request)], context.form)

    context.run(action)


@episodes.command()
@click.argument("name", metavar="EPISODE")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw what was measured, as PNG or SVG.")
@output_option
@pass_context
def show(context: Context, name: str, plot: Path | None) -> None:
    """Show everything of one episode: its evidence in order of weight, its replicas, what a person said of it."""

    async def action(client: Client) -> None:
        episode = to_plain(await _found(client, name))
        if plot is not None:
            from enova_cli.episode_plot import plot_episode

            plot_episode(episode, plot)
        if context.form is not output.Format.TABLE:
            output.print_object(KIND, episode, context.form)
            return
        output.print_description({key: value for key, value in episode.items() if key != "series"})

    context.run(action)


@episodes.command()
@click.argument("name", metavar="EPISODE")
@click.argument("word", metavar="true|false|none", required=False, type=click.Choice(sorted(_WORDS)))
@click.option("--cause", default="", help="What it was: overload, slow, hung, leak, ...; says that it was one.")
@output_option
@pass_context
def label(context: Context, name: str, word: str | None, cause: str) -> None:
    """Say whether an episode was one (true), a false alarm (false), or what it was. `none` takes that back."""
    if word is None and not cause:
        raise click.UsageError("say true or false, or what it was by --cause")
    meant = _WORDS[word] if word is not None else Episode.LABEL_TRUE

    async def action(client: Client) -> None:
        full = (await _found(client, name)).name
        request = LabelEpisodeRequest(name=full, label=meant, cause=cause)
        episode = await client.call(lambda s: s.verdicts.LabelEpisode(request, timeout=CALL_TIMEOUT_S))
        plain = to_plain(episode)
        said = " ".join(part for part in (str(plain["label"]), plain["label_cause"]) if part)
        output.print_fact(plain, f"{output.short(full)} is labelled {said}", context.form)

    context.run(action)


async def _object(client: Client, what: str) -> str:
    if not what:
        return ""
    from enova_cli.commands.resources import find, parse_kind

    kind, name = parse_kind(what)
    return str((await find(client, kind, name))["name"])


async def _found(client: Client, name: str) -> Episode:
    """An episode by its name, or by how that begins or ends where only one does. Raises NotFound."""
    wanted = name.removeprefix("episodes/")
    try:
        request = GetEpisodeRequest(name=f"episodes/{wanted}")
        return await client.call(lambda s: s.verdicts.GetEpisode(request, timeout=CALL_TIMEOUT_S))
    except NotFound:
        every = await client.list_episodes()
        short = [(each, each.name.removeprefix("episodes/")) for each in every]
        matching = [each for each, text in short if text.startswith(wanted) or text.endswith(wanted)]
        if len(matching) != 1:
            raise
        return matching[0]


async def _follow(client: Client, request: ListEpisodesRequest, form: output.Format) -> None:
    """What there is, then each change; after an outage again what there is."""
    revision = 0
    shown: dict[str, dict[str, Any]] = {}

    def wanted(plain: dict[str, Any]) -> bool:
        concerned = not request.object or any(
            each == request.object or each.startswith(f"{request.object}/")
            for each in (plain["object"], *plain["members"])
        )
        return concerned and (request.state != Episode.STATE_OPEN or plain["state"] == "OPEN")

    def tell(changed: Iterable[Episode]) -> None:
        fresh = [
            plain
            for plain in map(to_plain, changed)
            if (wanted(plain) or plain["name"] in shown) and shown.get(plain["name"]) != plain
        ]
        shown.update({plain["name"]: plain for plain in fresh})
        if fresh and form is output.Format.TABLE:
            output.print_objects(KIND, fresh, form)
        for plain in fresh if form is not output.Format.TABLE else ():
            output.print_line(plain, form)
        sys.stdout.flush()

    def watched(stubs: Stubs, _again: bool) -> AsyncIterable[WatchEpisodesResponse]:
        return stubs.verdicts.WatchEpisodes(WatchEpisodesRequest(resume_revision=revision))

    async for response in client.follow(watched, endless=True):
        if response is None:
            revision = 0           # the store may have forgotten it: all comes again, and is told where it changed
            continue
        revision = response.revision
        for name in response.deleted:
            shown.pop(name, None)
        tell(response.changed)
