"""`sere artifact inspect`: what an artifact says of itself."""

from pathlib import Path
from typing import TYPE_CHECKING

from sere.calibration_jobs.publish.pictures import all_pictures
from sere.calibration_jobs.publish.tables import layer_tables_table, manifest_rows, new_table, quality_tables
from sere.conf.errors import ConfigError
from sere.pipeline.tracking.artifacts import load_artifact

if TYPE_CHECKING:
    from rich.console import Console


def inspect(path_or_uri: str, *, uri: str | None, output: str | None, console: "Console") -> None:
    """Print an artifact's manifest and figures.

    Args:
        path_or_uri: The artifact: a path, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        uri: MLflow tracking URI.
        output: Folder for its pictures; None: none are drawn.
        console: Where to print.

    Raises:
        ConfigError: if there is no such artifact, or the pictures cannot be written.
    """
    artifact = load_artifact(path_or_uri, uri=uri)
    quality = artifact.manifest.get("quality") or {}
    table = new_table(path_or_uri, "manifest", "")
    for key, value in manifest_rows(artifact).items():
        table.add_row(key, value)
    console.print(table)
    if artifact.table_names:
        console.print(layer_tables_table(artifact))
    else:
        console.print("No tables beside similarities: policies that need some are refused (`sere calibrate` makes them).")
    for made in quality_tables(quality):
        console.print(made)
    if not quality.get("held_out"):
        console.print("Not judged on held-out rows (judge.held_out_rows was 0, or the artifact is of an older version).")
    if output is not None:
        for path, figure in all_pictures(artifact, quality):
            try:
                (Path(output) / path).parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(Path(output) / path, dpi=110)
            except OSError as error:
                raise ConfigError(f"cannot write pictures into {output} ({error.strerror}): choose another --output") from error
        console.print(f"Pictures are in {output}")
