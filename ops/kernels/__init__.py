"""The fast implementations of the reference: CUDA sources and their launcher."""
