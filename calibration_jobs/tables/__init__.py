"""What policies need to know of experts beside their similarity, as mergeable sums. Read base.py first: it holds the nouns."""

from typing import TYPE_CHECKING

from sere.conf.lazy_table import LazyTable

if TYPE_CHECKING:
    from sere.calibration_jobs.tables.base import TableSums

TABLE_CLASSES: "LazyTable[type[TableSums]]" = LazyTable(
    "table",
    {
        "norms": "sere.calibration_jobs.tables.norms:NormSums",
        "protected": "sere.calibration_jobs.tables.norms:LargestOutputs",
        "beta": "sere.calibration_jobs.tables.beta:RatioCounts",
        "folds": "sere.calibration_jobs.tables.folds:FoldSums",
        "means": "sere.calibration_jobs.tables.norms:OutputSums",
        "surrogates": "sere.calibration_jobs.tables.surrogates:SurrogateSums",
    },
)
"""What a name in `tables` stands for."""
