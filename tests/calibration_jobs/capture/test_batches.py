"""Padding, and the tokens of a block."""

import pytest

from sere.calibration_jobs.capture.batches import block_tokens_of, pad_rows
from sere.conf.errors import ConfigError
from sere.conf.schema import CalibrateConfig


def test_rows_are_padded_on_the_right():
    batch = pad_rows([(5, 6, 7), (8,)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 12), ("bfloat16", 10)])
def test_a_block_fits_its_memory(dtype, num_bytes):
    def tokens(limit: int) -> int:
        config = CalibrateConfig(model="m", data="d", output="o", dtype=dtype, block_tokens=64, max_activation_bytes=limit)
        return block_tokens_of(config, num_experts=8, hidden_size=32)

    one = 8 * 32 * num_bytes
    assert tokens(1 << 30) == 64 and tokens(9 * one) == tokens(10 * one - 1) == 9 and tokens(4 * one) == 4
    with pytest.raises(ConfigError, match=f"must be at least {4 * one} for this model"):
        tokens(4 * one - 1)
