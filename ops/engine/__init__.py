"""What runs inside a vLLM process: the plugin, its state, checks, the roles of rows, counters.

For programs that use vLLM's `LLM(...)` directly, one line makes sure that re-routing is on: `assert_rerouting(llm)`.
"""

from sere.ops.engine.status import assert_rerouting

__all__ = ["assert_rerouting"]
