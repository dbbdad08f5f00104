"""Jobs that were begun before some of today's settings existed: what those settings then count as. Pure functions."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_type_hints

from sere.conf.nested import flatten


def schema_defaults(schema: type) -> dict[str, Any]:
    """The defaults of a schema's fields as flat JSON values with dotted keys; fields without one are left out.

    A section that is null by default has both: its own key, and those of its class.
    """
    hints, found = get_type_hints(schema), dict[str, Any]()
    for entry in dataclasses.fields(schema):
        hint = hints[entry.name]
        section = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if isinstance(section, type):
            found |= {f"{entry.name}.{key}": value for key, value in schema_defaults(section).items()}
            if entry.default is None:
                found[entry.name] = None
        elif entry.default is not dataclasses.MISSING:
            found[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            found |= flatten({entry.name: entry.default_factory()})
    return json.loads(json.dumps(found))


def settings_then(before: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job begun earlier, in today's keys.

    Args:
        before: As its job.json has them.
        now: Today's settings of such a job.
        absent: What a key counts as that `before` lacks. A dotted one counts only where `before` has its section: a job without
            re-routing has none of its keys.

    Returns:
        `before`, and those of the keys of `now` that it lacks and `absent` knows.
    """
    sections = {key.rpartition(".")[0] for key in before}
    missing = {key for key in absent if key in now and key not in before and key.rpartition(".")[0] in {*sections, ""}}
    return {**before, **{key: absent[key] for key in missing}}


def learnt_now(before: Mapping[str, Any], now: Mapping[str, Any], earlier: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """Today's values of settings for which a job begun earlier has what then stood for them.

    Args:
        before: The settings of that job.
        now: Today's settings of such a job.
        earlier: By setting, what may stand for today's value.
    """
    return {key: now[key] for key, values in earlier.items() if key in before and before[key] in values}
