"""Configuration: the schema of every job, its loader, and one documented YAML per job. Imports none of the other packages."""
