"""Ray actors that hold the model, and their tasks."""
