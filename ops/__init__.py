"""Expert re-routing itself: tensors in, tensors out. Knows nothing of Ray, MLflow or datasets."""
