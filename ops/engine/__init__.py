"""What runs inside a vLLM process: the plugin, its state, checks, the roles of rows, counters."""
