"""Stable Diffusion in memory: loading a model folder, sampling, and the DreamBooth loss."""
