"""Scores a fine-tuned model by how close its pictures come to the instance images."""
