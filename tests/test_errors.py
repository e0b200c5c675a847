from __future__ import annotations

import pickle

import pytest

from dreambooth import errors


def test_the_tree_is_the_one_that_is_drawn() -> None:
    assert issubclass(errors.UserError, errors.DreamBoothError)
    for kind in (
        errors.HyperparameterError,
        errors.DatasetError,
        errors.ModelArtifactError,
        errors.RequestError,
    ):
        assert issubclass(kind, errors.UserError)
        assert kind.__name__ in (errors.__doc__ or "")
    for other in (errors.ResourceError, errors.UnavailableError, errors.TrainingDivergedError):
        assert issubclass(other, errors.DreamBoothError)
        assert not issubclass(other, errors.UserError)
        assert other.__name__ in (errors.__doc__ or "")
    assert issubclass(errors.UnavailableError, errors.ResourceError)


def test_one_fault_is_reported_as_it_is() -> None:
    assert str(errors.HyperparameterError(["a is wrong."])) == "a is wrong."
    assert str(errors.HyperparameterError("a is wrong.")) == "a is wrong."


def test_many_faults_are_all_reported() -> None:
    error = errors.HyperparameterError(["a is wrong.", "b is wrong."])

    assert str(error) == "2 settings are wrong: (1) a is wrong. (2) b is wrong."
    assert error.faults == ("a is wrong.", "b is wrong.")


@pytest.mark.parametrize(
    "error",
    [
        errors.HyperparameterError(["a", "b"]),
        errors.RequestError("too large", 413),
        errors.UnavailableError("The model is still loading.", retry_after_s=2.5),
        errors.TrainingDivergedError("not finite", step=7),
        errors.DatasetError("empty"),
    ],
)
def test_errors_survive_a_trip_between_processes(error: errors.DreamBoothError) -> None:
    twin = pickle.loads(pickle.dumps(error))

    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.__dict__ == error.__dict__


def test_a_request_is_bad_unless_said_otherwise() -> None:
    assert errors.RequestError("no prompt").status == 400
    assert errors.RequestError("no prompt", status=415).status == 415
