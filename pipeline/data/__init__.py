"""Finding, reading and widening input."""
