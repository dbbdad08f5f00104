"""Expert re-routing itself: tensors in, tensors out. Knows nothing of Ray, MLflow or datasets."""

if __name__ != "sere.ops":
    # Under two names the torch library would be registered twice, and a class would not be equal to itself.
    raise ImportError("this folder is the package sere.ops: import that (see Install in the README)")
