"""What a similarity artifact may hold for each layer, and what is wrong with a tensor that is not that.

`similarity.py` reads and writes the file.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sere.conf.errors import ConfigError

_TOLERANCE = 1e-4
_ADVICE = "compute it again with `sere calibrate`"


class SimilarityError(ConfigError):
    """An artifact that cannot be used. The message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Table:
    """How a table of a layer looks, beside the similarities."""

    dtype: torch.dtype
    shape: tuple[str, ...]
    """E: experts, H: the layer's hidden size, R: `surrogate_rank` of the manifest, ER: E times R, 1."""
    low: float = float("-inf")
    high: float = float("inf")


TABLES = {
    "norms": Table(torch.float32, ("E",), low=0),
    "protected": Table(torch.uint8, ("E",), high=1),
    "beta": Table(torch.float32, ("1",), low=0, high=1),
    "folds": Table(torch.float32, ("E", "E"), low=-4, high=4),
    "fold_losses": Table(torch.float32, ("E", "E"), low=0, high=1),
    "means": Table(torch.bfloat16, ("E", "H")),
    "surrogate_out": Table(torch.bfloat16, ("ER", "H")),
    "surrogate_in": Table(torch.bfloat16, ("ER", "H")),
    "surrogate_means": Table(torch.bfloat16, ("R", "E", "H")),
}
"""By name:

- norms: mean output norm over all tokens, divided by its mean over the layer's experts.
- protected: 1 for super experts (arXiv 2507.23279).
- beta: median of w_j / w_1 over tokens and slots j >= 2 (arXiv 2402.14800).
- folds: row u (replaced), column v: the factor s(u to v) of arXiv 2608.24938; fold_losses: what it loses, relative.
- means: mean output over all tokens.
- surrogate_out U, surrogate_in V: expert-major; the first r of an expert's R rows are its surrogate of rank r.
- surrogate_means: intercepts, `[r - 1]` for rank r: y_e(x) is about mu_r,e + sum over k < r of U[e R + k] (V[e R + k] . x).
"""


def check_manifest(manifest: Any) -> None:
    """Refuse a manifest that lacks what every artifact has, or has something else in its place.

    Raises:
        SimilarityError: names the key and what is there.
    """
    if not isinstance(manifest, dict):
        raise SimilarityError(f"the manifest must be a JSON object, is {_short(manifest)}: {_ADVICE}")
    for key in ("num_experts", "layers", "metrics", "model"):
        if not manifest.get(key):
            raise SimilarityError(f"the manifest lacks {key!r}: {_ADVICE}")
    names = [manifest["metrics"], manifest.get("tables") or []]
    is_right = {
        "num_experts": _is_count(manifest["num_experts"]) and manifest["num_experts"] > 0,
        "layers": _are_distinct(manifest["layers"], _is_count),
        "metrics": _are_distinct(names[0], _is_name),
        "tables": _are_distinct(names[1], _is_name),
        "model": isinstance(manifest["model"], dict)
        and isinstance(manifest["model"].get("name"), str | None)
        and isinstance(manifest["model"].get("digest"), str | None),
        "quality": isinstance(manifest.get("quality"), dict | None),
    }
    for key, right in is_right.items():
        if not right:
            raise SimilarityError(f"the manifest's {key} cannot be {_short(manifest[key])}: {_ADVICE}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and "." not in value


def _are_distinct(values: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(is_one, values)) and len(set(values)) == len(values)


def _short(value: Any) -> str:
    shown = reprlib.repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def check_matrix(name: str, matrix: Tensor, num_experts: int) -> None:
    """Refuse a matrix that is not a similarity of `num_experts` experts.

    Raises:
        SimilarityError: if it is not; names it as `name`.
    """
    if matrix.dtype != torch.float32 or tuple(matrix.shape) != (num_experts, num_experts):
        raise SimilarityError(
            f"{name} must be float32 [{num_experts}, {num_experts}], is {matrix.dtype} {list(matrix.shape)}: {_ADVICE}"
        )
    if not torch.isfinite(matrix).all():
        raise SimilarityError(f"{name} has NaN or infinite values: {_ADVICE}")
    low, high = matrix.min().item(), matrix.max().item()
    if low < 0 or high > 1 + _TOLERANCE:
        raise SimilarityError(f"{name} has values outside [0, 1] ({low:.4g} to {high:.4g}): {_ADVICE}")
    skew = (matrix - matrix.T).abs().max().item()
    if skew > _TOLERANCE:
        raise SimilarityError(f"{name} is not symmetric (largest difference {skew:.4g}): {_ADVICE}")
    if (matrix.diagonal() - 1).abs().max().item() > _TOLERANCE:
        raise SimilarityError(f"{name} must have a diagonal of 1: {_ADVICE}")
    if num_experts > 1 and not (matrix - torch.diag(matrix.diagonal())).any():
        raise SimilarityError(f"{name} is the identity: no expert resembles another, so nothing was measured: {_ADVICE}")


def check_tables(tables: dict[tuple[int, str], Tensor], manifest: dict[str, Any]) -> None:
    """Refuse tables that are not those of the manifest, or not what their names say.

    Raises:
        SimilarityError: names the layer, the table and what is wrong.
    """
    names, layers = manifest.get("tables") or [], manifest["layers"]
    unknown = sorted(set(names) - set(TABLES))
    if unknown:
        raise SimilarityError(f"the artifact has tables this program does not know ({', '.join(unknown)}): {_ADVICE}")
    rank = manifest.get("surrogate_rank")
    if "surrogate_in" in names and not (isinstance(rank, int) and rank >= 1):
        raise SimilarityError(f"the manifest must have a surrogate_rank of at least 1, has {rank!r}: {_ADVICE}")
    expected = {(layer, name) for layer in layers for name in names}
    for layer, name in sorted(expected ^ set(tables)):
        state = "is missing" if (layer, name) in expected else "is not in the manifest"
        raise SimilarityError(f"table {name} of layer {layer} {state}: the artifact is damaged, {_ADVICE}")
    num_experts = manifest["num_experts"]
    hidden_size = next(
        (table.shape[-1] for (_, name), table in sorted(tables.items()) if table.dim() and "H" in TABLES[name].shape), 0
    )
    sizes = {"1": 1, "E": num_experts, "H": hidden_size, "R": rank or 0, "ER": num_experts * (rank or 0)}
    for (layer, name), table in tables.items():
        _check_table(f"table {name} of layer {layer}", table, TABLES[name], sizes)


def _check_table(name: str, table: Tensor, expected: Table, sizes: dict[str, int]) -> None:
    shape = tuple(sizes[dimension] for dimension in expected.shape)
    if table.dtype != expected.dtype or tuple(table.shape) != shape or not table.numel():
        raise SimilarityError(f"{name} must be {expected.dtype} {list(shape)}, is {table.dtype} {list(table.shape)}: {_ADVICE}")
    if not torch.isfinite(table).all():
        raise SimilarityError(f"{name} has NaN or infinite values: {_ADVICE}")
    low, high = table.min().item(), table.max().item()
    if low < expected.low or high > expected.high:
        raise SimilarityError(
            f"{name} has values outside [{expected.low:g}, {expected.high:g}] ({low:.4g} to {high:.4g}): {_ADVICE}"
        )
