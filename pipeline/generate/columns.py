"""Which of the input's columns a generate job uses, and whether they will do."""

import pyarrow as pa

from sere.conf.errors import ConfigError
from sere.conf.masking import mask_uri
from sere.conf.schema import GenerateConfig
from sere.pipeline.data.source import FILE_NUMBER, PROBLEM, PROMPT, InputSpec
from sere.pipeline.evaluate.scorers import EXACT_MATCH
from sere.pipeline.generate.replica.answers import RESULT_SCHEMA


def input_spec(config: GenerateConfig) -> InputSpec:
    """Where a generate job's input is."""
    return InputSpec(
        data=config.data,
        text_column=config.prompt_column,
        data_format=config.data_format,
        data_split=config.data_split,
        data_revision=config.data_revision,
        storage_options=config.storage_options,
        # Otherwise the prompt is made of other columns.
        checks_text=config.template is None and config.messages_column is None,
    )


def references_of(config: GenerateConfig, schema: pa.Schema) -> str:
    """The column of references that answers are scored against; "" where the input has none."""
    return config.reference_column if config.reference_column in schema.names else ""


def check_columns(config: GenerateConfig, schema: pa.Schema) -> None:
    """Refuse input that cannot be answered, or whose columns the results would overwrite.

    Raises:
        ConfigError: if a column is missing, of the wrong type, or named like one of the results'.
    """
    shown = mask_uri(config.data)
    wanted = {"sampling_column": config.sampling_column, "lora_column": config.lora_column}
    if config.messages_column is not None:
        wanted["messages_column"] = config.messages_column
    elif config.template is None:
        wanted["prompt_column"] = config.prompt_column
    else:
        for name in sorted(template_columns(config.template)):
            wanted[f"template (it uses {name!r})"] = name
    for key, column in wanted.items():
        if column is not None and column not in schema.names:
            raise ConfigError(f"{shown} has no column {column!r} (there: {', '.join(schema.names)}): set {key}")
    made = {*RESULT_SCHEMA.names, PROBLEM, PROMPT, FILE_NUMBER, *([EXACT_MATCH] if references_of(config, schema) else [])}
    for name in schema.names:
        if name in made:
            raise ConfigError(f"{shown} has a column {name!r}, which the result would overwrite: rename it")
        if schema.names.count(name) > 1:
            raise ConfigError(f"{shown} has two columns {name!r}: rename one")
    if config.id_column in RESULT_SCHEMA.names:
        raise ConfigError(f"id_column {config.id_column!r} is a column of the results: choose another name")
    for column in config.order_by:
        if column not in schema.names or pa.types.is_nested(schema.field(column).type):
            raise ConfigError(
                f"{shown} has no column {column!r} of plain values (there: {', '.join(schema.names)}): set order_by"
            )
    if "prompt_column" in wanted:
        kind = schema.field(config.prompt_column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise ConfigError(f"column {config.prompt_column!r} of {shown} is {kind}, not text: set prompt_column")


def template_columns(template: str) -> set[str]:
    """The columns that a template uses.

    Raises:
        ConfigError: if it is no template.
    """
    import jinja2
    import jinja2.meta

    try:
        return jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(template))
    except jinja2.TemplateError as error:
        raise ConfigError(f"template is not a Jinja template ({error}): {template!r}") from error
