"""What may go wrong in a `sere generate` job, done to jobs on purpose; the command is `fault_matrix.py`, beside this folder."""
