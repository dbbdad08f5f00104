"""Joining or starting a Ray cluster, and whether it has room."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.runtime.interrupts import end_in_order_on_sigterm

_CONNECT_S = 10.0


def start_ray(num_cpus: float, *, address: str | None) -> None:
    """Join a cluster, or start a local one; does nothing if Ray already runs.

    A local Ray can be reached from this machine only, and asks for a token.

    Args:
        num_cpus: Cores a local Ray must at least offer. Ray counts cores without occupying them, so on a small machine that
            may be more than there are.
        address: Of the cluster; None starts a local Ray.

    Raises:
        ConfigError: if there is no cluster at the address, or it does not let us in.
    """
    import ray

    # What goes wrong reaches the user as an exception. After it Ray would print what calls raised that nobody asks any more.
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if ray.is_initialized():
        return
    if address is None:
        # Ray would run workers at nice 15, behind whatever else this machine does.
        os.environ.setdefault("RAY_worker_niceness", "0")
        with _on_this_machine_only():
            # Without "local" Ray would join whatever cluster it finds on this machine.
            _init("local", num_cpus=max(os.cpu_count() or 1, int(num_cpus) + 1))
    else:
        _join(address)
    # Ray sets a handler of its own.
    end_in_order_on_sigterm()


def _init(address: str, **options: Any) -> None:
    import ray

    # Workers' own output stays in their log files (under /tmp/ray); the jobs print progress and errors.
    ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **options)


@contextmanager
def _on_this_machine_only() -> Iterator[None]:
    """Have Ray's processes listen on the loopback interface: Ray does so where it does not support clusters of machines.

    Giving it 127.0.0.1 as the node's address does not help: Ray replaces that by the address in the network.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    os.environ.setdefault(name, "0")
    # Ray read the variable when it was imported, which was before.
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, True)
    try:
        yield
    finally:
        # This process may join a cluster later.
        ray_constants.ENABLE_RAY_CLUSTER = before


def _join(address: str) -> None:
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import RayError

    # `ray start` asks for a token as soon as there is one, which is so after the first local Ray; joining by an address does
    # not send it unless told to. A process that sends one also asks for it, so a cluster without tokens must get none.
    if _asks_for_token(address):
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        _init(address)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"the Ray cluster at RAY_ADDRESS={address} cannot be joined ({' '.join(str(error).split())}): check the address, "
            "that it runs this Ray and Python version, and that ~/.ray/auth_token (or RAY_AUTH_TOKEN) here is the one its "
            "head was started with"
        ) from error


def _asks_for_token(address: str) -> bool:
    """Whether the cluster at an address wants a token.

    Raises:
        ConfigError: if no Ray answers there: Ray itself would try for minutes.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    place = address.rpartition("://")[2]
    if place == "auto":
        # Of this machine, by `ray start`.
        return True
    host, _, port = place.rpartition(":")
    try:
        if not host or not port.isdecimal():
            raise ValueError("the form is HOST:PORT")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        # Something takes connections, and may be anything.
        channel = init_grpc_channel(place)
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
            NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), timeout=_CONNECT_S)
        except grpc.RpcError as error:
            # Another error says something of what answers there, and Ray says it again.
            return error.code() == grpc.StatusCode.UNAUTHENTICATED
        finally:
            channel.close()
    except (OSError, OverflowError, ValueError, grpc.FutureTimeoutError) as error:
        reason = str(error) or "what answers is not Ray"
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}): start one with `ray start --head`, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from error
    return False


def refuse_missing_room(needs: dict[str, float], *, address: str | None, what: str, remedy: str) -> None:
    """Refuse what a local Ray, which cannot grow, will never have room for.

    Args:
        needs: Amounts by Ray's names of resources: CPU, GPU.
        address: As in `start_ray`; a cluster may grow, and is not asked.
        what: Who needs that, for the message.
        remedy: What the user can lower; `{}` becomes "cpus" or "gpus".

    Raises:
        ConfigError: if there is too little of one resource.
    """
    import ray

    if address is not None:
        return
    there = ray.cluster_resources()
    for name, needed in needs.items():
        if needed > there.get(name, 0):
            raise ConfigError(
                f"{what} needs {needed:g} {name}s and this machine has {there.get(name, 0):g}: lower "
                f"{remedy.format(f'{name.lower()}s')}, or set RAY_ADDRESS to join a cluster"
            )
