"""Training: the training plan, memory plans, optimizer, loop, checkpoints and step metrics."""
