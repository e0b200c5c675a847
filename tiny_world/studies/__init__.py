"""Holds the published experiments, one module each, and what they share (`frame`)."""
