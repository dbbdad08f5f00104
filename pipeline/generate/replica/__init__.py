"""A replica: the Ray actor, its engine, requests and answers."""
