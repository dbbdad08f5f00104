"""Every token through every expert. Read experts.py first: it holds the nouns."""
