"""Joining or starting a Ray cluster."""

import logging
import os


def start_ray(num_cpus: float) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one; does nothing if Ray already runs.

    Args:
        num_cpus: Cores a local Ray must at least offer. Ray counts cores without occupying them, so on a small machine that
            may be more than there are.
    """
    import ray

    # ray.data.llm starts Ray once more and is told, at length, that it runs.
    logging.getLogger("ray").setLevel(logging.ERROR)
    if not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": max(os.cpu_count() or 1, int(num_cpus) + 1)}
        # Workers' own output stays in their log files (under /tmp/ray); the jobs print progress and errors.
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, **local)
