"""Makes the fixtures of tests/training available here."""

from tests.training.conftest import loaded_small_model, make_training

__all__ = ["loaded_small_model", "make_training"]
