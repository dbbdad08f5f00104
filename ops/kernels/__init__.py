"""The fast implementations of the reference: CUDA sources and their launchers, torch operations, sorted neighbours."""
