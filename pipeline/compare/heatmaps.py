"""Pictures of a similarity artifact's matrices, experts that are alike side by side."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from sere.ops.similarity import SimilarityArtifact


def cluster_order(similarity: "Tensor") -> list[int]:
    """Experts in the order of a hierarchical clustering (average linkage of 1 - similarity): alike ones side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(similarity) < 3:
        return list(range(len(similarity)))
    distance = squareform((1 - similarity).clamp(min=0).fill_diagonal_(0).double().numpy(), checks=False)
    tree = linkage(distance, method="average")
    # Ordering the leaves takes time in the cube of their number.
    return [int(leaf) for leaf in leaves_list(optimal_leaf_ordering(tree, distance) if len(similarity) <= 256 else tree)]


def heatmaps(artifact: "SimilarityArtifact") -> Iterator[tuple[str, "Figure"]]:
    """One picture per layer, a panel per metric, each in its own cluster order and colour range."""
    from matplotlib.figure import Figure

    for layer in artifact.layers:
        figure = Figure(figsize=(4.6 * len(artifact.metrics), 4.2), layout="constrained")
        panels = figure.subplots(1, len(artifact.metrics), squeeze=False)[0]
        for panel, metric in zip(panels, artifact.metrics, strict=True):
            matrix = artifact.matrix(layer, metric)
            order = cluster_order(matrix)
            shown = matrix[order][:, order].clone().fill_diagonal_(float("nan"))
            image = panel.imshow(shown.numpy(), cmap="viridis", interpolation="nearest")
            panel.set(title=f"layer {layer}, {metric}", xlabel="experts, alike ones side by side")
            panel.set(xticks=[], yticks=[])
            figure.colorbar(image, ax=panel, shrink=0.8)
        yield f"heatmaps/layer_{layer:03d}.png", figure
