"""What users run: the `sere` command, generation over datasets, evaluation and comparison; and what both jobs stand on."""

if __name__ != "sere.pipeline":
    # Under two names the torch library would be registered twice, and a class would not be equal to itself.
    raise ImportError("this folder is the package sere.pipeline: import that (see Install in the README)")
