"""`sere generate`: a dataset through vLLM replicas."""
