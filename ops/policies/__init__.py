"""Routing policies: what happens to the experts a router selected. One file per family, chosen by name from `POLICIES`."""

from typing import TYPE_CHECKING

from sere.conf.lazy_table import LazyTable

if TYPE_CHECKING:
    from sere.ops.policies.base import Policy

POLICIES: "LazyTable[type[Policy]]" = LazyTable(
    "policy",
    {
        "none": "sere.ops.policies.none:NonePolicy",
        "sere": "sere.ops.policies.sere:SerePolicy",
        "top_k": "sere.ops.policies.top_k:TopKPolicy",
        "random": "sere.ops.policies.random:RandomPolicy",
    },
)
