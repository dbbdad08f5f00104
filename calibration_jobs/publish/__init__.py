"""What a finished calibration leaves for people: numbers, pictures, tables, versions."""
