"""The only user of MLflow: runs, what is in a store, the registry."""
