"""Steps of policies for slow checkers (the thread sanitizer, compute-sanitizer): few, and of every rule."""

import itertools
from collections.abc import Iterator

import torch

from sere.conf.schema import RerouteConfig
from sere.ops.policies.scoring import Scoring
from tests.ops.strategies import PolicyStep


def some_policy_steps() -> Iterator[PolicyStep]:
    """One of every vote and target rule, of more rows than have room in one warp."""
    generator = torch.Generator().manual_seed(2)
    votes = [
        {"rule": "top", "primary_top_k": 1.5, "order": "selection"},
        {"rule": "mass", "protect": True},
        {"rule": "share", "share": 0.5},
        {"rule": "benefit", "benefit": 0.5},
        *({"rule": "budget", "budget": 5, "first": True, "score": score} for score in ("probability", "lynx")),
    ]
    for rules, (target, weights) in itertools.product(
        votes, (("own", "half"), ("least_loss", "fold"), ("drop", "renormalize"))
    ):
        logits = torch.randn(24, 16, generator=generator).bfloat16().float()
        scoring = Scoring(function="sigmoid", bias=torch.rand(16, generator=generator), num_groups=4, groups_kept=2)
        scores, selection = scoring.scores(logits)
        ids = selection.topk(4).indices
        yield PolicyStep(
            reroute=RerouteConfig(policy="oea", similarity="x", votes=rules, targets={"rule": target}, weights=weights),
            topk_weights=scores.gather(1, ids),
            topk_ids=ids.int(),
            logits=logits,
            scoring=scoring,
            tables={
                "norms": torch.rand(16, generator=generator),
                "protected": torch.arange(16) == 3,
                "folds": torch.rand(16, 16, generator=generator),
                "fold_losses": torch.rand(16, 16, generator=generator),
            },
            roles=torch.randint(0, 3, (24,), generator=generator, dtype=torch.int8),
            renormalize=True,
        )
