"""Makes similarity artifacts: captures expert outputs, accumulates similarity, records the result."""
