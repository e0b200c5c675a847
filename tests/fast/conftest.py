"""The fixtures of the training loop are those of the fast one, too."""

from tests.training.conftest import loaded_small_model, make_training

__all__ = ["loaded_small_model", "make_training"]
