"""Run one training job, from its settings to the trained model."""
