"""A training job, in its order of work."""
