"""Starts and ends the Ray actors of replicas, with the room they need."""

from typing import Any

import pyarrow as pa

from sere.conf.schema import GenerateConfig
from sere.pipeline.generate.parts import Parts
from sere.pipeline.generate.replica.spec import ReplicaSpec


def num_devices(config: GenerateConfig) -> int:
    """Devices a replica is split over."""
    return config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size


def gpus_per_replica(config: GenerateConfig) -> float:
    """GPUs to reserve for a replica where there are any."""
    given = config.engine.gpus_per_replica
    return float(num_devices(config)) if given is None else given


def wanted_room(config: GenerateConfig, *, on_gpu: bool) -> str:
    """What room a replica needs, and what is free in the cluster now: for one that waits."""
    import ray

    engine = config.engine
    needs = {"CPU": engine.cpus_per_replica}
    if on_gpu:
        needs["GPU"] = gpus_per_replica(config)
        if engine.accelerator_type:
            needs[f"accelerator_type:{engine.accelerator_type}"] = needs["GPU"]
    free = ray.available_resources()
    asked = ", ".join(f"{amount:g} {name}" for name, amount in needs.items())
    there = ", ".join(f"{free.get(name, 0):g} {name}" for name in needs)
    return (
        f"each needs {asked}, on one node unless engine.executor is ray; free in the cluster are {there}. They start when it "
        "has room; engine.num_replicas, cpus_per_replica and gpus_per_replica say what is asked"
    )


class ReplicaStarter:
    """Starts and ends the Ray actors of replicas."""

    def __init__(
        self,
        config: GenerateConfig,
        arguments: dict[str, Any],
        parts: Parts,
        input_schema: pa.Schema,
        *,
        session: str,
        on_gpu: bool,
    ) -> None:
        """Nothing is started yet.

        Args:
            config: Of the job.
            arguments: Of the engines.
            parts: Where they write.
            input_schema: The input's columns.
            session: What the replicas' names begin with; no other driver's may, at any time.
            on_gpu: Whether they take GPUs.
        """
        self._config, self._arguments, self._on_gpu = config, arguments, on_gpu
        self._parts, self._input_schema = parts, input_schema
        self._session = session
        self._groups: dict[Any, Any] = {}

    def start(self, number: int) -> tuple[str, Any]:
        """Start a replica; returns its name and the actor, which waits for room in the cluster if need be."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from sere.pipeline.generate.replica.actor import Replica

        engine = self._config.engine
        name = f"{self._session}-r{number:04d}"
        spec = ReplicaSpec(name, self._config, self._arguments, self._parts, self._input_schema)
        options: dict[str, Any] = {"num_cpus": engine.cpus_per_replica, "max_restarts": 0, "max_concurrency": 1000}
        group = None
        if self._on_gpu:
            accelerator = {f"accelerator_type:{engine.accelerator_type}": 0.001} if engine.accelerator_type else {}
            if engine.executor == "ray" and num_devices(self._config) > 1:
                # A replica over nodes: vLLM starts a worker in each bundle, and Ray keeps the bundles together.
                bundle = {"GPU": 1, "CPU": engine.cpus_per_replica, **accelerator}
                group = placement_group([bundle] * num_devices(self._config), strategy="PACK")
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
                options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}
            else:
                options |= {"num_gpus": gpus_per_replica(self._config), "resources": accelerator}
        actor = ray.remote(Replica).options(**options).remote(spec)
        if group is not None:
            self._groups[actor] = group
        return name, actor

    def end(self, actor: Any) -> None:
        """End a replica, dead or alive, and free what it held."""
        import ray
        from ray.util import remove_placement_group

        ray.kill(actor)
        if actor in self._groups:
            remove_placement_group(self._groups.pop(actor))
