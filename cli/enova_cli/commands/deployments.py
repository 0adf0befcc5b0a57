"""apply, deploy, delete, scale, wait, pause, resume: what users ask for."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from pathlib import Path
from typing import Any

import click
from google.protobuf.field_mask_pb2 import FieldMask
from rich.console import Console

from enova.v1 import cluster_pb2
from enova.v1.deployment_service_pb2 import (
    AcceptProposalRequest,
    DeleteDeploymentRequest,
    ScaleDeploymentRequest,
    UpdateDeploymentRequest,
)
from enova_cli import output
from enova_cli.client import CALL_TIMEOUT_S, Client
from enova_cli.commands.resources import parse_kind
from enova_cli.context import Context, output_option, pass_context
from enova_cli.manifest import parse_manifest, read_manifests, update_paths
from enova_cli.plain import enum_word, to_plain
from enova_common.errors import Conflict, InvalidField, NotFound, TimedOut, Unavailable

# InspectModel asks a host and may read a large directory: longer than other calls.
APPLY_TIMEOUT_S = 60.0
WAIT_POLL_S = 0.2
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class Duration(click.ParamType[float]):
    """A duration with a unit: 500ms, 2s, 5m, 1h; seconds without one."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, float):
            return value
        match = _DURATION.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration such as 500ms, 2s or 5m", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


def request_id() -> str:
    """A fresh id that makes a write idempotent for 24 hours."""
    return str(uuid.uuid4())


async def apply_deployment(
    client: Client, deployment: cluster_pb2.Deployment, paths: tuple[str, ...] | None = None, *, validate: bool = False
) -> cluster_pb2.Deployment:
    """Create it, or change these fields into what is wanted: by default all but the pause of its policy."""
    request = UpdateDeploymentRequest(
        deployment=deployment,
        update_mask=FieldMask(paths=update_paths(None) if paths is None else paths),
        allow_missing=True,
        request_id=request_id(),
        validate_only=validate,
    )
    return await client.call(lambda s: s.deployments.UpdateDeployment(request, timeout=APPLY_TIMEOUT_S))


@click.command()
@click.option(
    "-f", "--file", "files", type=click.Path(path_type=Path), multiple=True, required=True, help="YAML; - for stdin."
)
@click.option("--validate-only", is_flag=True, help="Check everything, change nothing.")
@output_option
@pass_context
def apply(context: Context, files: tuple[Path, ...], validate_only: bool) -> None:
    """Create or change deployments from deployment.yaml files."""

    async def action(client: Client) -> None:
        manifests = [manifest for file in files for manifest in read_manifests(file)]
        results = [
            await apply_deployment(client, m.deployment, m.update_paths, validate=validate_only) for m in manifests
        ]
        output.print_objects("deployments", [to_plain(result) for result in results], context.form)

    context.run(action)


@click.command()
@click.argument("model")
@click.option("--name", help="Of the deployment; derived from the model by default.")
@click.option("--replicas", type=int, help="A fixed number; no policy acts.")
@click.option("--min", "minimum", type=int, help="Fewest replicas under autoscaling.")
@click.option("--max", "maximum", type=int, help="Most replicas under autoscaling.")
@click.option("--ttft-p95", type=Duration(), help="Objective: time to first token, 500ms.")
@click.option("--tpot-p95", type=Duration(), help="Objective: time per output token, 50ms.")
@click.option("--gpu", "gpus", multiple=True, help="Allowed GPU type; may be repeated.")
@click.option(
    "--set", "settings", multiple=True, metavar="FLAG=VALUE", help="Engine setting under vLLM's name, max_num_seqs=64."
)
@click.option("--policy", default="", help="Scaling policy.")
@click.option("--wait/--no-wait", "wait_for_ready", default=False, help="Wait until it is ready.")
@click.option("--timeout", type=Duration(), default=600.0, help="With --wait.")
@output_option
@pass_context
def deploy(
    context: Context,
    model: str,
    name: str | None,
    replicas: int | None,
    minimum: int | None,
    maximum: int | None,
    ttft_p95: float | None,
    tpot_p95: float | None,
    gpus: tuple[str, ...],
    settings: tuple[str, ...],
    policy: str,
    wait_for_ready: bool,
    timeout: float,
) -> None:
    """Serve MODEL: a path on the hosts, org/name, or a name of the catalogue."""
    document: dict[str, Any] = {"name": name or derive_name(model), "model": model}
    document |= {
        key: value
        for key, value in {"replicas": replicas, "min": minimum, "max": maximum, "policy": policy or None}.items()
        if value is not None
    }
    objectives = {k: v for k, v in {"ttft_p95_s": ttft_p95, "tpot_p95_s": tpot_p95}.items() if v is not None}
    if objectives:
        document["objectives"] = objectives
    if gpus:
        document["hardware"] = {"allow": list(gpus)}
    if settings:
        document["configuration"] = dict(parse_setting(text) for text in settings)

    async def action(client: Client) -> None:
        result = await apply_deployment(client, parse_manifest(document))
        if wait_for_ready:
            result = await wait_ready(client, result.name, timeout, context.form)
        output.print_object("deployments", to_plain(result), context.form)

    context.run(action)


def derive_name(model: str) -> str:
    """A deployment's name from its model: the last part, in lower case, with what names may not hold made `-`."""
    return re.sub(r"[^a-z0-9]+", "-", model.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-")[:63]


def parse_setting(text: str) -> tuple[str, Any]:
    """FLAG=VALUE with the value as YAML reads it, so that numbers are numbers."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise InvalidField("expected FLAG=VALUE", field="--set", remedy="--set max_num_seqs=64")
    return key.strip().replace("-", "_"), yaml.safe_load(value)


def _deployment_name(what: str) -> str:
    text = what if "/" in what else f"deployment/{what}"
    kind, name = parse_kind(text)
    if kind != "deployments" or not name:
        raise click.BadParameter(f"{what!r} is not a deployment: give deployment/NAME")
    return f"deployments/{name}"


@click.command()
@click.argument("what", metavar="deployment/NAME|node/NAME")
@click.option("--wait/--no-wait", "wait_gone", default=True, help="Wait until nothing of it runs.")
@click.option("--timeout", type=Duration(), default=120.0, help="With --wait.")
@output_option
@pass_context
def delete(context: Context, what: str, wait_gone: bool, timeout: float) -> None:
    """Delete a deployment: its replicas drain and end. Or forget a node that is LOST."""
    from enova.v1.node_service_pb2 import DeleteNodeRequest

    if what.startswith("node"):
        node = DeleteNodeRequest(name=f"nodes/{parse_kind(what)[1]}", request_id=request_id())
        context.run(lambda client: client.call(lambda s: s.nodes.DeleteNode(node, timeout=CALL_TIMEOUT_S)))
        _tell_deleted(node.name, context.form)
        return
    name = _deployment_name(what)

    async def action(client: Client) -> None:
        request = DeleteDeploymentRequest(name=name, request_id=request_id())
        await client.call(lambda s: s.deployments.DeleteDeployment(request, timeout=CALL_TIMEOUT_S))
        if wait_gone:
            await _wait_gone(client, name, timeout)
        _tell_deleted(name, context.form, gone=wait_gone)

    context.run(action)


def _tell_deleted(name: str, form: output.Format, *, gone: bool = True) -> None:
    state = "DELETED" if gone else "DELETING"
    output.print_fact({"name": name, "state": state}, f"{output.short(name)} is {state}", form)


@click.command()
@click.argument("what", metavar="deployment/NAME")
@click.option("--replicas", type=click.IntRange(min=0), required=True)
@output_option
@pass_context
def scale(context: Context, what: str, replicas: int) -> None:
    """Set the number of replicas now; an autoscaled deployment goes on from there."""
    request = ScaleDeploymentRequest(name=_deployment_name(what), replicas=replicas, request_id=request_id())

    async def action(client: Client) -> None:
        result = await client.call(lambda s: s.deployments.ScaleDeployment(request, timeout=CALL_TIMEOUT_S))
        output.print_object("deployments", to_plain(result), context.form)

    context.run(action)


@click.command()
@click.argument("what", metavar="deployment/NAME")
@click.option("--etag", default="", help="The proposal's, as it was read: one that came meanwhile is not taken.")
@click.option("--validate-only", is_flag=True, help="Check everything, change nothing.")
@output_option
@pass_context
def accept(context: Context, what: str, etag: str, validate_only: bool) -> None:
    """Put the configuration that is proposed for a deployment in force; it rolls out replica by replica.

    A configuration of your own is thereby turned over to enova: leave it out of the file that you apply next.
    """
    request = AcceptProposalRequest(
        name=_deployment_name(what), etag=etag, request_id=request_id(), validate_only=validate_only
    )

    async def action(client: Client) -> None:
        result = await client.call(lambda s: s.deployments.AcceptProposal(request, timeout=CALL_TIMEOUT_S))
        output.print_object("deployments", to_plain(result), context.form)

    context.run(action)


def _set_paused(context: Context, what: str, paused: bool) -> None:
    deployment = cluster_pb2.Deployment(name=_deployment_name(what), autoscaling_paused=paused)
    request = UpdateDeploymentRequest(
        deployment=deployment, update_mask=FieldMask(paths=["autoscaling_paused"]), request_id=request_id()
    )

    async def action(client: Client) -> None:
        result = await client.call(lambda s: s.deployments.UpdateDeployment(request, timeout=APPLY_TIMEOUT_S))
        output.print_object("deployments", to_plain(result), context.form)

    context.run(action)


@click.command()
@click.argument("what", metavar="deployment/NAME")
@output_option
@pass_context
def pause(context: Context, what: str) -> None:
    """Stop the policy of a deployment from acting."""
    _set_paused(context, what, paused=True)


@click.command()
@click.argument("what", metavar="deployment/NAME")
@output_option
@pass_context
def resume(context: Context, what: str) -> None:
    """Let the policy of a deployment act again."""
    _set_paused(context, what, paused=False)


@click.command()
@click.argument("what", metavar="deployment/NAME")
@click.option("--for", "condition", type=click.Choice(["ready", "deleted"]), default="ready")
@click.option("--replicas", type=click.IntRange(min=1), default=1, help="Ready ones to wait for, if more than its min.")
@click.option("--timeout", type=Duration(), default=120.0)
@output_option
@pass_context
def wait(context: Context, what: str, condition: str, replicas: int, timeout: float) -> None:
    """Wait until a deployment is ready (its replicas READY and routed by every ingress), or deleted."""
    name = _deployment_name(what)

    async def action(client: Client) -> None:
        if condition == "deleted":
            await _wait_gone(client, name, timeout)
            _tell_deleted(name, context.form)
            return
        result = await wait_ready(client, name, timeout, context.form, replicas=replicas)
        output.print_object("deployments", to_plain(result), context.form)

    context.run(action)


async def wait_ready(
    client: Client, name: str, timeout_s: float, form: output.Format, *, replicas: int = 1
) -> cluster_pb2.Deployment:
    """The deployment once max(`replicas`, min) of its replicas are READY at its generation and routed everywhere.

    Raises TimedOut with what is missing, Conflict when the newest generation has failed for good.
    """
    deadline = time.monotonic() + timeout_s
    console = Console(stderr=True, quiet=form is not output.Format.TABLE)
    with console.status(f"{output.short(name)}: waiting") as status:
        answered = False
        while True:
            try:
                deployment = await client.get_deployment(name)
                members = await client.list_replicas(name)
            except Unavailable as error:
                # One that answered before is coming back; one that never did is not where we look.
                if not answered or time.monotonic() > deadline:
                    raise
                status.update(error.message)
                await asyncio.sleep(WAIT_POLL_S)
                continue
            answered = True
            if is_ready(deployment, members, replicas):
                return deployment
            progress = describe_progress(deployment, members)
            status.update(progress)
            if deployment.state == cluster_pb2.Deployment.STATE_FAILED:
                raise Conflict(
                    deployment.reason, reason="DEPLOYMENT_FAILED", remedy=f"enova explain {_kind_name(name)}"
                )
            if time.monotonic() > deadline:
                message = f"{output.short(name)} is not ready after {timeout_s:g} s: {progress}"
                raise TimedOut(message, reason="NOT_READY", remedy=f"enova explain {_kind_name(name)}")
            await asyncio.sleep(WAIT_POLL_S)


def is_ready(deployment: cluster_pb2.Deployment, replicas: list[cluster_pb2.Replica], wanted: int = 1) -> bool:
    """max(`wanted`, min) replicas READY at the current generation and in every ingress's routes."""
    if deployment.observed_generation != deployment.generation:
        return False
    minimum = deployment.replicas if deployment.HasField("replicas") else deployment.min
    good = [
        replica
        for replica in replicas
        if replica.state == cluster_pb2.Replica.STATE_READY
        and replica.routed
        and replica.generation == deployment.generation
    ]
    return len(good) >= max(wanted, minimum)


def describe_progress(deployment: cluster_pb2.Deployment, replicas: list[cluster_pb2.Replica]) -> str:
    """One line: how many replicas are in which state and phase, and why nothing moves."""
    field = cluster_pb2.Replica.DESCRIPTOR.fields_by_name["state"]
    words = [
        f"{replica.name.rsplit('/', 1)[1]} {enum_word(field, replica.state)}"
        + (f" ({replica.phase})" if replica.phase else "")
        + (f": {replica.reason}" if replica.reason else "")
        for replica in replicas
    ]
    return f"{output.short(deployment.name)}: " + ("; ".join(words) or deployment.reason or "no replicas yet")


async def _wait_gone(client: Client, name: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    answered = False
    while time.monotonic() < deadline:
        try:
            await client.get_deployment(name)
            answered = True
        except NotFound:
            return
        except Unavailable:
            if not answered:
                raise
        await asyncio.sleep(WAIT_POLL_S)
    message = f"{output.short(name)} is not gone after {timeout_s:g} s"
    raise TimedOut(message, reason="NOT_DELETED", remedy=f"enova explain {_kind_name(name)}")


def _kind_name(name: str) -> str:
    return f"deployment/{output.short(name)}"
