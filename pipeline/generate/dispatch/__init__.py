"""Rows to replicas, and back from those that die."""
