"""Whether an engine re-routes, asked of its workers: vLLM itself only logs that a plugin was left out or failed to load."""

from typing import Any

STATUS_METHOD = "sere_status"
"""The method that the plugin gives vLLM's workers: called by name, as works over processes, and missing without the plugin."""

_REMEDY = (
    "unset VLLM_PLUGINS or name sere in it, and install the package sere where the engine's processes run (vLLM logs 'Failed "
    "to load plugin sere' where its import fails)"
)


def assert_rerouting(engine: Any) -> None:
    """Make sure that every worker of an engine has the plugin, with a policy on its MoE layers.

    Args:
        engine: A `vllm.LLM` or a `vllm.v1.engine.llm_engine.LLMEngine`; its workers may be other processes.

    Raises:
        RuntimeError: if the engine would answer as the unmodified model, with what to do about it.
    """
    try:
        workers: list[dict[str, Any]] = engine.collective_rpc(STATUS_METHOD)
    except Exception as error:
        if STATUS_METHOD not in str(error):
            # A dead engine, say.
            raise
        raise RuntimeError(
            f"nothing is re-routed: this engine's workers did not load the vLLM plugin sere: {_REMEDY}"
        ) from error
    if any(worker["policy"] is None for worker in workers):
        raise RuntimeError(
            "nothing is re-routed: the engine was made without a `sere` section: pass additional_config={'sere': {...}}"
        )
    # A stage of a pipeline may have none.
    if not any(worker["num_layers"] for worker in workers):
        raise RuntimeError("nothing is re-routed: no worker of this engine has a MoE layer")
