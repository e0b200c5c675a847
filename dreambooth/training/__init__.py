"""The DreamBooth training step: plan, optimizer, learning-rate curve, loop, state and report."""
