"""certs init and issue: the files of mutual TLS."""

from __future__ import annotations

from pathlib import Path

import click

from enova_cli import output
from enova_cli.context import Context, fail, output_option, pass_context
from enova_common import certs as certificates
from enova_common.errors import EnovaError


@click.group()
def certs() -> None:
    """Make the certificate authority of a fleet, and certificates for its programs and users."""


@certs.command()
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@click.option("--days", type=int, default=3650, show_default=True)
@output_option
@pass_context
def init(context: Context, directory: Path, days: int) -> None:
    """Create the authority: ca.crt and ca.key. Keep ca.key off the hosts."""
    try:
        authority = certificates.init_authority(directory, days=days)
    except EnovaError as error:
        fail(error, context.form)
    _tell(context, authority)


@certs.command()
@click.argument("role", type=click.Choice([role.value for role in certificates.Role]))
@click.argument("name")
@click.option("--dir", "directory", type=click.Path(path_type=Path), default=Path("certs"), show_default=True)
@click.option("--host", "hosts", multiple=True, help="DNS name or IP address that it serves under; may be repeated.")
@click.option("--days", type=int, default=90, show_default=True)
@output_option
@pass_context
def issue(context: Context, role: str, name: str, directory: Path, hosts: tuple[str, ...], days: int) -> None:
    """Issue ROLE's certificate for NAME: enova certs issue agent gpu-host-1 --host 10.0.0.5."""
    try:
        issued = certificates.issue(directory, certificates.Role(role), name, hosts=list(hosts), days=days)
    except EnovaError as error:
        fail(error, context.form)
    _tell(context, issued)


def _tell(context: Context, pair: certificates.Issued) -> None:
    value = {"certificate": str(pair.certificate_path), "key": str(pair.key_path)}
    output.print_fact(value, f"wrote {pair.certificate_path} and {pair.key_path}", context.form)
