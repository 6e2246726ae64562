"""Keeps a replica on a single machine off the network: one server of Ray Serve listens everywhere, whatever the host.

Every replica also runs a gRPC server for calls between deployments; Ray binds it to all interfaces. It asks for Ray's
token, but on one machine nothing outside has business there at all.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica

_EVERYWHERE = "[::]:0"
_LOOPBACK = "127.0.0.1"


def keep_on_loopback() -> None:
    """On a node whose address is loopback, bind the replica's internal server there too. Call before it starts.

    Rests on a private function of Ray 2.60; the data path's contract test sees every listening socket.
    """
    if ray.util.get_node_ip_address() != _LOOPBACK:
        return
    original = serve_replica.add_port_to_grpc_server

    def bind(server: Any, address: str) -> int:
        return int(original(server, f"{_LOOPBACK}:0" if address == _EVERYWHERE else address))

    serve_replica.add_port_to_grpc_server = bind
