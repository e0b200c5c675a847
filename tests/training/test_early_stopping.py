"""The rule that ends a run, on readings."""

from __future__ import annotations

from dreambooth.training.early_stopping import CLASS_RISE, GUIDANCE_LIMIT, decision, fault
from dreambooth.training.meter import BINS, MeterReading


def reading(step: int, *, guidance: float = 1.0, drift: float = 0.5) -> MeterReading:
    return MeterReading(
        step=step,
        loss=0.5,
        losses=(0.5,) * BINS,
        drifts={"class": drift, "other_class": 0.2, "empty": 0.2},
        moved=0.1,
        guidance=guidance,
        convergence=None,
    )


BURNT = GUIDANCE_LIMIT + 0.01


def test_a_run_whose_pictures_do_not_burn_goes_to_its_end() -> None:
    assert decision([]) is None
    assert decision([reading(step, guidance=GUIDANCE_LIMIT) for step in range(9)]) is None


def test_one_reading_alone_ends_nothing() -> None:
    assert decision([reading(10), reading(20, guidance=BURNT), reading(30)]) is None


def test_two_in_a_row_end_it_and_the_last_good_one_is_kept() -> None:
    rows = [reading(10), reading(20), reading(30, guidance=2.5), reading(40, guidance=2.75)]
    found = decision([*rows, reading(50)])
    assert found is not None
    assert (found.step, found.kept) == (40, 20)
    assert found.sentence(100) == (
        "stopped at step 40 of 100: what guidance multiplies is 2.75 times the base's, and above "
        "1.4 pictures burn; the model is that of step 20"
    )


def test_a_run_that_burns_from_the_start_keeps_nothing() -> None:
    found = decision([reading(10, guidance=BURNT), reading(20, guidance=BURNT)])
    assert found is not None
    assert found.kept is None
    assert "no earlier reading was better" in found.sentence(100)


def test_a_class_that_moves_with_the_subject_from_the_start_is_not_being_lost() -> None:
    assert decision([reading(step, drift=0.95) for step in range(9)]) is None


def test_a_class_that_was_held_and_is_let_go_is() -> None:
    rows = [reading(10, drift=0.9), reading(20, drift=0.3)]
    assert fault(reading(30, drift=0.3 + CLASS_RISE), rows) is None
    why = fault(reading(30, drift=0.3 + CLASS_RISE + 0.01), rows)
    assert why == "the class is being lost: it moves 0.56 of what the subject does, after 0.30"
