"""Where applications reach the fleet: the ingress of a node that is ready."""

from __future__ import annotations

import ssl

from enova.v1 import cluster_pb2
from enova_cli.client import Client
from enova_common.errors import InvalidField, Unavailable


def trust(ca: str) -> ssl.SSLContext | bool:
    """What an ingress's certificate is checked against: the file, or the system's if none is given."""
    if not ca:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl.SSLError is one
        remedy = "give a PEM file that this user may read"
        raise InvalidField(f"{ca}: {error.strerror or error}", field="--ca", remedy=remedy) from error


async def openai_url(client: Client) -> str:
    """The OpenAI base URL, .../v1, of the first ready node's ingress. Raises Unavailable if there is none."""
    for node in sorted(await client.list_nodes(), key=lambda node: node.name):
        if node.state == cluster_pb2.Node.STATE_READY and node.openai_address:
            address = node.openai_address
            base = address if "://" in address else f"http://{address}"
            return base.rstrip("/").removesuffix("/v1") + "/v1"
    remedy = "start enova-ingress beside an agent, or give --url"
    raise Unavailable("no ready node has an ingress", reason="NO_INGRESS", remedy=remedy)
