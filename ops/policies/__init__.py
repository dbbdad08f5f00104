"""Routing policies, chosen by name."""
