"""Joining or starting a Ray cluster, and whether it has room."""

import logging
import os
from typing import Any

from sere.conf.errors import ConfigError
from sere.pipeline.runtime.interrupts import end_in_order_on_sigterm


def start_ray(num_cpus: float, *, address: str | None) -> None:
    """Join a cluster, or start a local one; does nothing if Ray already runs.

    Args:
        num_cpus: Cores a local Ray must at least offer. Ray counts cores without occupying them, so on a small machine that
            may be more than there are.
        address: Of the cluster; None starts a local Ray.
    """
    import ray

    # What goes wrong reaches the user as an exception.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        return
    where: dict[str, Any] = {"address": address}
    if address is None:
        # Ray would run workers at nice 15, behind whatever else this machine does.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Without "local" Ray would join whatever cluster it finds on this machine.
        where = {"address": "local", "num_cpus": max(os.cpu_count() or 1, int(num_cpus) + 1)}
    # Workers' own output stays in their log files (under /tmp/ray); the jobs print progress and errors.
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **where)
    # Ray sets a handler of its own.
    end_in_order_on_sigterm()


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
