"""`sere compare` and `sere sweep`: runs side by side."""
