"""Stable Diffusion itself: model folders in and out, sampling, and the loss as pure functions."""
