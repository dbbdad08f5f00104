"""`sere artifact inspect`: what an artifact says of itself."""

from pathlib import Path
from typing import TYPE_CHECKING

from sere.calibration_jobs.publish.pictures import all_pictures
from sere.calibration_jobs.publish.tables import (
    add_row,
    layer_tables_table,
    manifest_rows,
    new_table,
    quality_tables,
    refuse_damaged,
)
from sere.conf.errors import ConfigError
from sere.pipeline.tracking.artifacts import load_artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from sere.ops.similarity import SimilarityArtifact


def inspect(path_or_uri: str, *, uri: str | None, output: str | None, console: "Console") -> None:
    """Print an artifact's manifest and figures.

    Args:
        path_or_uri: The artifact: a path, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        uri: MLflow tracking URI.
        output: Folder for its pictures; None: none are drawn.
        console: Where to print.

    Raises:
        ConfigError: if there is no such artifact, it is damaged, or the pictures cannot be written.
    """
    artifact = load_artifact(path_or_uri, uri=uri)
    quality = artifact.manifest.get("quality") or {}
    with refuse_damaged(path_or_uri):
        tables = [_manifest_table(path_or_uri, artifact), *_tables_of(artifact), *quality_tables(quality)]
    for made in tables:
        console.print(made)
    if not artifact.table_names:
        console.print("No tables beside similarities: policies that need some are refused (`sere calibrate` makes them).")
    if not quality.get("held_out"):
        console.print("Not judged on held-out rows (judge.held_out_rows was 0, or the artifact is of an older version).")
    if output is not None:
        with refuse_damaged(path_or_uri):
            for path, figure in all_pictures(artifact, quality):
                _write(figure, Path(output), path)
        console.print(f"Pictures are in {output}", markup=False)


def _manifest_table(title: str, artifact: "SimilarityArtifact") -> "Table":
    table = new_table(title, "manifest", "")
    for key, value in manifest_rows(artifact).items():
        add_row(table, key, value)
    return table


def _tables_of(artifact: "SimilarityArtifact") -> list["Table"]:
    return [layer_tables_table(artifact)] if artifact.table_names else []


def _write(figure: "Figure", folder: Path, path: str) -> None:
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise ConfigError(f"a metric's name makes a path out of the folder, {path}: the artifact is damaged, calibrate again")
    try:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / path, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write pictures into {folder} ({error.strerror}): choose another --output") from error
