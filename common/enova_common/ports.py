"""Why an address cannot be listened on: servers say only that they failed to bind, a trial says why."""

from __future__ import annotations

import errno
import socket

from enova_common.address import Address
from enova_common.errors import AlreadyExists, CallerError


def check_listenable(address: Address, *, field: str) -> None:
    """Raises an error that names the address, the field and what to do, if nothing could listen there now."""
    if address.is_unix or address.port == 0:
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address.host, address.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AlreadyExists(
                    f"{address} is in use by another program",
                    reason="ADDRESS_IN_USE",
                    field=field,
                    remedy=f"stop it (ss -ltnp 'sport = :{address.port}' shows it), or choose another port",
                ) from error
            raise cannot_listen(address, error.strerror or str(error), field=field) from error


def cannot_listen(address: Address, why: str, *, field: str) -> CallerError:
    """The error of an address that is not this host's or not for this user."""
    remedy = "give an address of this host, and a port above 1023 unless it may use those below"
    return CallerError(f"cannot listen on {address}: {why}", reason="CANNOT_LISTEN", field=field, remedy=remedy)
