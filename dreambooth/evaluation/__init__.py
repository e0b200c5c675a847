"""Scores of a fine-tuned model: how near its pictures come to the instance images."""
