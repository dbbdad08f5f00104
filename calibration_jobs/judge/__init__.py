"""How good matrices are, on held-out rows."""
