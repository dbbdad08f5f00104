"""Reads a job's YAML with `key=value` overrides into its frozen dataclass. The only user of OmegaConf.

One precedence rule: defaults of the schema, then the YAML file, then the overrides.
"""

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from sere.conf.errors import ConfigError, unknown_key

Config = TypeVar("Config")


def load_config(schema: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as `reroute.primary_top_k=1`, and check everything.

    Raises:
        ConfigError: one line, naming the key or value that is wrong.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"config file {file} does not exist")
    try:
        from_file = OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(from_file, DictConfig):
        raise ConfigError(f"{file} must hold keys and values at the top level")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r} must have the form key=value, for example engine.max_num_seqs=16")
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, GrammarParseError) as error:
            raise ConfigError(
                f"override {override!r} is not valid YAML after the =: put the value in quotes, as in \"key='*.jsonl'\""
            ) from error
    try:
        from_overrides = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(from_file, from_overrides)
        values = OmegaConf.to_container(merged, resolve=True)
        assert isinstance(values, dict)
        _check_keys(schema, values, f"{file} or the command line" if overrides else str(file))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
        assert isinstance(config, schema)
        return config
    except MissingMandatoryValue as error:
        raise ConfigError(f"{file}: {error.full_key} must be set") from error
    except (OmegaConfBaseException, GrammarParseError) as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{file}: {key}{str(error.msg or error).splitlines()[0]}") from error


def _nested(hint: Any) -> type | None:
    """The dataclass of a field, also where it may be None."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _check_keys(schema: type, values: dict[Any, Any], where: str, prefix: str = "") -> None:
    """Name the first unknown or missing key; OmegaConf's own messages do not suggest the right one."""
    hints = get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}", list(hints), where)
        nested = _nested(hints[key])
        if nested is not None and value is not None and not isinstance(value, dict):
            raise ConfigError(f"{where}: {prefix}{key} must hold keys and values, got {value!r}")
        if nested is not None and isinstance(value, dict):
            _check_keys(nested, value, where, f"{prefix}{key}.")
    for field in dataclasses.fields(schema):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and values.get(field.name) is None:
            raise ConfigError(f"{where}: {prefix}{field.name} must be set")
