"""Runs: a folder that tells the truth about one training job, and lists of such folders."""
