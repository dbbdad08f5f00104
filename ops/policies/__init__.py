"""Routing policies: votes x targets x weights x compensation, one file per family of rules. Read policy.py first.

What a policy's name stands for is in `sere.conf.schema.named`.
"""
