"""What every job stands on: Ray, signals, storage."""
