"""Ray actors that hold the model, and their tasks. Read task.py first: it holds the nouns."""
