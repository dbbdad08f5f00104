"""Every token through every expert."""
