"""Makes similarity artifacts: captures expert outputs, accumulates similarity, judges and publishes the result."""

if __name__ != "sere.calibration_jobs":
    # Under two names the torch library would be registered twice, and a class would not be equal to itself.
    raise ImportError("this folder is the package sere.calibration_jobs: import that (see Install in the README)")
