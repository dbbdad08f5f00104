"""The settings of every job: schemas, reading, errors. Imports nothing else of the project."""

if __name__ != "sere.conf":
    # Under two names the torch library would be registered twice, and a class would not be equal to itself.
    raise ImportError("this folder is the package sere.conf: import that (see Install in the README)")
