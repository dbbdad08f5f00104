"""How fast a router's weights fall off: the median that expert skipping compares with (NAEE, arXiv 2402.14800)."""

import torch
from torch import Tensor

from sere.calibration_jobs.capture.experts import TokenBlock
from sere.calibration_jobs.tables.base import TableSums

NUM_BINS = 4096


class RatioCounts(TableSums):
    """Median over tokens of the weights of a row's further slots, as shares of its largest; from a histogram, to 1 / 4096."""

    def update(self, block: TokenBlock) -> None:
        ranked = block.topk_weights.float().sort(dim=1, descending=True).values
        ratios = (ranked[:, 1:] / ranked[:, :1].clamp(min=1e-30)).clamp(0, 1).flatten()
        self.add("counts", torch.histc(ratios.cpu(), bins=NUM_BINS, min=0, max=1))

    def finalize(self) -> dict[str, Tensor]:
        counts = self.sums["counts"].cumsum(0)
        # With one slot a row there is no ratio: every row keeps what it has.
        place = int(torch.searchsorted(counts, counts[-1] / 2)) if counts[-1] > 0 else 0
        return {"beta": torch.tensor([(place + 0.5) / NUM_BINS], dtype=torch.float32)}
