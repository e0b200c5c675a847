from __future__ import annotations

from collections import Counter

import torch

from dreambooth.data import sample_draws


def draw(samples: range, **changes: object) -> sample_draws.SampleDraws:
    settings: dict[str, object] = {
        "seed": 3,
        "stream": "instance",
        "crop_counts": (1, 4, 2),
        "latent_shape": (4, 2, 2),
        "train_timesteps": 1000,
    }
    return sample_draws.draw(samples, **{**settings, **changes})


def test_a_sample_depends_on_its_number_alone() -> None:
    together = draw(range(10, 14))
    for row, number in enumerate(range(10, 14)):
        alone = draw(range(number, number + 1))
        assert torch.equal(together.images[row], alone.images[0])
        assert torch.equal(together.noise[row], alone.noise[0])
        assert torch.equal(together.posterior_noise[row], alone.posterior_noise[0])
        assert together.timesteps[row] == alone.timesteps[0]
        assert together.crop_indices[row] == alone.crop_indices[0]


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first = draw(range(4))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first.noise, draw(range(4)).noise)
    torch.manual_seed(1)
    draw(range(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_round_uses_each_picture_once_in_a_new_order() -> None:
    rounds = [
        [
            sample_draws.picture_of(s, seed=0, stream="instance", count=8)
            for s in range(r * 8, r * 8 + 8)
        ]
        for r in range(50)
    ]
    assert all(Counter(order) == Counter(range(8)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 45


def test_instance_and_class_images_are_shuffled_independently() -> None:
    met = {
        (
            sample_draws.picture_of(s, seed=0, stream="instance", count=8),
            sample_draws.picture_of(s, seed=0, stream="class", count=16),
        )
        for s in range(16 * 60)
    }
    # If the instance's index chose the class image, few pairs would occur; independent draws give
    # all.
    assert len(met) > 0.95 * 8 * 16


def test_crops_are_drawn_among_those_the_picture_has() -> None:
    drawn = draw(range(600))
    for picture, crops in enumerate((1, 4, 2)):
        chosen = drawn.crop_indices[drawn.images == picture]
        assert set(chosen.tolist()) == set(range(crops))


def test_timesteps_cover_the_whole_schedule() -> None:
    timesteps = draw(range(4000)).timesteps
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert timesteps.min() < 5
    assert timesteps.max() > 994
    assert abs(timesteps.float().mean() - 499.5) < 15


def test_seed_and_stream_change_the_noise() -> None:
    base = draw(range(1)).noise
    assert not torch.equal(base, draw(range(1), seed=4).noise)
    assert not torch.equal(base, draw(range(1), stream="class").noise)


def test_sample_numbers_never_overlap_between_steps_micro_batches_and_processes() -> None:
    numbers = [
        number
        for step in range(3)
        for micro_batch in range(2)
        for process in range(2)
        for number in sample_draws.sample_numbers(
            step=step,
            micro_batch=micro_batch,
            batch_size=3,
            micro_batches=2,
            process=process,
            processes=2,
        )
    ]
    assert sorted(numbers) == list(range(3 * 2 * 2 * 3))


def test_four_micro_batches_of_one_are_one_of_four() -> None:
    single = [
        sample_draws.sample_numbers(
            step=5, micro_batch=m, batch_size=1, micro_batches=4, process=0, processes=1
        )[0]
        for m in range(4)
    ]
    whole = sample_draws.sample_numbers(
        step=5, micro_batch=0, batch_size=4, micro_batches=1, process=0, processes=1
    )
    assert single == list(whole)


def test_a_gpu_is_given_pinned_memory_which_it_copies_while_the_host_goes_on() -> None:
    class Given:
        """Stands in for a CPU tensor where there is no GPU."""

        pinned = False

        def pin_memory(self) -> Given:
            self.pinned = True
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> bool:
            return self.pinned and non_blocking

    assert sample_draws.onto(torch.device("cuda"), Given())  # type: ignore[arg-type]


SUBJECTS = (range(3), range(3, 5), range(5, 12))  # with 3, 2 and 7 pictures


def test_subjects_take_turns_whatever_their_numbers_of_pictures() -> None:
    crops = (1,) * 12
    drawn = draw(range(3 * 42), crop_counts=crops, groups=SUBJECTS).images.tolist()
    for first in range(0, len(drawn), 3):
        assert all(image in group for image, group in zip(drawn[first:], SUBJECTS, strict=False))
    for turn, group in enumerate(SUBJECTS):
        assert set(Counter(drawn[turn::3]).values()) == {42 // len(group)}


def test_subjects_of_one_class_share_its_images() -> None:
    groups = (range(4), range(4, 10), range(4))  # the first and the third are of one class
    drawn = draw(range(3 * 4), crop_counts=(1,) * 10, groups=groups).images.tolist()
    of_shared = [image for number, image in enumerate(drawn) if number % 3 != 1]
    assert Counter(of_shared) == {image: 2 for image in range(4)}
    assert of_shared[:4] == [
        sample_draws.picture_of(turn, seed=3, stream="instance", count=4) for turn in range(4)
    ]


def test_a_single_subject_draws_what_it_always_drew() -> None:
    plain, grouped = draw(range(20)), draw(range(20), groups=(range(3),))
    assert torch.equal(plain.images, grouped.images)
    assert plain.images.tolist() == [
        sample_draws.picture_of(number, seed=3, stream="instance", count=3) for number in range(20)
    ]
    assert torch.equal(plain.noise, draw(range(20), crop_counts=(1, 4, 2)).noise)
