"""How good matrices are, on held-out rows. Read candidates.py first: it holds the nouns."""
