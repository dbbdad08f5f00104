"""What a routing policy is made of: votes x targets x weights x compensation.

`ops/reference.py` says what each rule does. Imports only the standard library, as all schemas do.
"""

from dataclasses import dataclass, field
from typing import Literal

from sere.conf.errors import ConfigError
from sere.conf.schema.checks import one_of

METRICS = ("frobenius", "cosine", "cka", "weights")
Metric = Literal["frobenius", "cosine", "cka", "weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Votes:
    """Which experts stay active in a step."""

    rule: Literal["all", "top", "mass", "share", "benefit", "budget"] = "top"
    protect: bool = False
    """Super experts (2507.23279) are active whenever a row selected them."""
    primary_top_k: float = 2
    """top: slots of each decode row that vote (the paper's S). 2.5: half of the rows vote with a third slot, those whose third
    one has the largest share of their weights."""
    by_batch: tuple[tuple[int, float], ...] = ()
    """top: S by the number of decode rows, as {1: 4, 16: 2}: 4 from 1 row on, 2 from 16 rows on. Empty: primary_top_k."""
    order: Literal["weight", "selection"] = "weight"
    """top: slots are ranked by weight, or by what the router ranks by (which differs where it has a bias)."""
    mass: float = 0.7
    """mass: the fewest slots of a row that hold this share of its weights."""
    share: float | None = None
    """share: slots with at least this share of the row's largest weight. None: the layer's median, from the artifact."""
    benefit: float = 1.0
    """benefit: experts whose sum over rows of (share of the row's weights x norm)^3 reaches this value's cube."""
    budget: int = 0
    """budget: so many experts in all."""
    score: Literal["probability", "weight", "norm", "lynx"] = "probability"
    """budget: by summed scores, weights, weights x norms, or LYNX's bins of weights."""
    first: bool = False
    """budget: each row's highest-weighted expert comes before all others."""
    winner: float = 1.0
    """budget: an expert that has more than this share of a row's weights comes before all others."""

    def __post_init__(self) -> None:
        one_of(self, "rule", "order", "score")
        steps = (self.primary_top_k, *(step for _, step in self.by_batch))
        if self.rule == "top" and not all(step >= 1 for step in steps):
            raise ConfigError(f"primary_top_k must be at least 1, got {min(steps):g}")
        for name in ("mass", "share", "winner"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"votes.{name} must be above 0 and at most 1, got {value}")
        if not 0 < self.benefit <= 100:
            raise ConfigError(f"votes.benefit must be above 0 and at most 100, got {self.benefit}")
        if self.rule == "budget" and self.budget < 1:
            raise ConfigError(
                f"votes.budget, the number of experts that stay active, must be set to 1 or more, got {self.budget or None}"
            )

    def steps(self) -> tuple[tuple[int, float], ...]:
        """S by the least number of decode rows, ascending; the first holds for fewer rows, too."""
        return self.by_batch or ((1, self.primary_top_k),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """Where a slot of a decode row goes whose expert is not active."""

    rule: Literal["similar", "own", "random", "least_loss", "drop", "drop_unvoted"] = "similar"
    metric: Metric = "cosine"
    """similar: which similarity."""
    threshold: float = 0.5
    """similar: the least similarity that re-routes (the paper's rho)."""
    seed: int = 0
    """random: its seed."""

    def __post_init__(self) -> None:
        one_of(self, "rule", "metric")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")

    @property
    def least_similarity(self) -> float:
        """What a replacement must reach, where targets are found by similarity or something like it."""
        return self.threshold if self.rule == "similar" else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Compensation:
    """What is added to a layer's output for the experts that were taken away."""

    rule: Literal["none", "mean", "surrogate"] = "none"
    rank: int = 0
    """surrogate: 1 to the artifact's surrogate_rank; 0 is mean."""

    def __post_init__(self) -> None:
        one_of(self, "rule")
        if not 0 <= self.rank <= 64:
            raise ConfigError(
                f"compensation.rank must be between 0 and 64, and at most the artifact's surrogate_rank, got {self.rank}"
            )


WeightRule = Literal["keep", "renormalize", "half", "fold", "router"]
_WEIGHT_RULES = ("keep", "renormalize", "half", "fold", "router")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """A policy, whole."""

    votes: Votes = field(default_factory=Votes)
    targets: Targets = field(default_factory=Targets)
    weights: WeightRule = "keep"
    """keep; renormalize: to the row's old sum; half: half way between the two, in logarithms; fold: moved slots by ExFold's
    factor; router: renormalize where the router does, else keep."""
    compensation: Compensation = field(default_factory=Compensation)

    def __post_init__(self) -> None:
        votes, targets = self.votes, self.targets
        if self.weights not in _WEIGHT_RULES:
            raise ConfigError(f"weights must be one of {', '.join(_WEIGHT_RULES)}, got {self.weights!r}")
        if self.weights == "fold" and targets.rule != "least_loss":
            raise ConfigError(f"weights 'fold' needs targets 'least_loss', got {targets.rule!r}: set targets.rule=least_loss")
        if targets.rule in ("drop", "drop_unvoted") and votes.rule == "budget" and not votes.first:
            raise ConfigError(f"targets {targets.rule!r} would leave rows without an expert: set votes.first=true")

    def changes_routing(self, top_k: int) -> bool:
        """Whether there is any step whose routing this policy changes, in a layer of `top_k` slots a row."""
        votes = self.votes
        everyone = votes.rule == "top" and all(most >= top_k for _, most in votes.steps())
        return votes.rule != "all" and not everyone

    def weights_where(self, renormalize: bool | None) -> WeightRule:
        """The weight rule in a model whose router renormalises its weights, or does not."""
        return self.weights if self.weights != "router" else "renormalize" if renormalize else "keep"

    @property
    def needs_scores(self) -> bool:
        """Whether the router's scores of all experts are needed, not only its choice."""
        votes = self.votes
        by_score = (votes.rule == "budget" and votes.score == "probability") or (
            votes.rule == "top" and votes.order == "selection"
        )
        return by_score or self.targets.rule == "own"

    def tables(self) -> list[str]:
        """What must be known of a layer beside its routing: names of the artifact's metrics and tables."""
        votes, targets = self.votes, self.targets
        found: list[str] = []
        if targets.rule == "similar" and votes.rule != "all":
            found.append(targets.metric)
        if targets.rule == "least_loss":
            found.append("fold_losses")
        if self.weights == "fold":
            found.append("folds")
        if votes.rule == "benefit" or (votes.rule == "budget" and votes.score == "norm"):
            found.append("norms")
        if votes.rule == "share" and votes.share is None:
            found.append("beta")
        if votes.protect:
            found.append("protected")
        if self.compensation.rule == "mean":
            found.append("means")
        if self.compensation.rule == "surrogate":
            found += ["surrogate_in", "surrogate_out", "surrogate_means"]
        return found
