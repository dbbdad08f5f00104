"""How many cases drawn tests draw: `make test-long` sets SERE_EXAMPLES to draw that many times as many."""

import os

FACTOR = int(os.environ.get("SERE_EXAMPLES", "1"))


def examples(number: int) -> int:
    """The number of cases of a test that usually draws `number`."""
    return number * FACTOR
