"""What users run: the `sere` command, generation over datasets, evaluation and comparison."""
