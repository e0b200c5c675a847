from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreambooth.data import class_latents
from dreambooth.data.class_images import Pixels, Sampled, SamplingShare, derived_seed, ensure
from dreambooth.errors import DatasetError, ResourceError


def latents_of(seed: int) -> class_latents.Latents:
    return np.random.default_rng(seed).normal(size=(4, 2, 3)).astype(np.float32)


def sampled(picture: Pixels | None, seed: int = 0) -> Sampled | None:
    return None if picture is None else Sampled(picture=picture, latents=latents_of(seed))


class Sampler:
    """Draws noise that depends only on the seed, and keeps a list of the batches asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.black: set[int] = set()
        self.broken: set[int] = set()
        self.stop_after = stop_after

    @property
    def seeds(self) -> list[int]:
        return [seed for batch in self.batches for seed in batch]

    def __call__(self, seeds: Sequence[int]) -> Sequence[Sampled | None]:
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(list(seeds))
        return [sampled(self.draw(seed), seed) for seed in seeds]

    def draw(self, seed: int) -> Pixels | None:
        if seed in self.broken:
            return None
        if seed in self.black:
            return np.full((16, 24, 3), 2, np.uint8)
        return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def run(
    folder: Path,
    sampler: Sampler,
    *,
    given: Sequence[Path] = (),
    count: int = 7,
    batch_size: int = 3,
    seed: int = 5,
    fingerprint: str = "abc",
    done: list[int] | None = None,
    share: SamplingShare | None = None,
) -> tuple[Path, ...]:
    counts: list[int] = [] if done is None else done
    return ensure(
        folder,
        given=given,
        count=count,
        batch_size=batch_size,
        seed=seed,
        sample=sampler,
        fingerprint=fingerprint,
        on_image=counts.append,
        share=share,
    )


def pixels(path: Path) -> Pixels:
    return np.asarray(Image.open(path).convert("RGB"))


def test_missing_pictures_are_sampled_in_batches_and_lossless(tmp_path: Path) -> None:
    sampler, done = Sampler(), []
    paths = run(tmp_path / "new" / "folder", sampler, done=done)
    assert [path.name for path in paths] == [f"class_{n:05d}.png" for n in range(7)]
    assert [len(batch) for batch in sampler.batches] == [3, 3, 1]
    assert done == list(range(8))
    for index, path in enumerate(paths):
        expected = sampler.draw(derived_seed(5, index))
        assert expected is not None
        assert np.array_equal(pixels(path), expected)
    names = [p.name for p in paths]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [*names, "latents"]
    kept = sorted(p.name for p in (paths[0].parent / "latents").iterdir())
    assert kept == [f"class_{n:05d}.safetensors" for n in range(7)]


def test_the_latents_of_a_picture_are_kept_with_it(tmp_path: Path) -> None:
    for index, path in enumerate(run(tmp_path, Sampler())):
        kept = class_latents.read(path, origin="abc", shape=(4, 2, 3))
        assert kept is not None
        assert np.array_equal(kept, latents_of(derived_seed(5, index)))


def test_where_a_picture_is_its_latents_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        moved.append(Path(target).suffix)
        original(source, target)

    monkeypatch.setattr("dreambooth.process.files.os.replace", replace)
    run(tmp_path, Sampler(), count=2)
    assert moved == [".safetensors", ".png"] * 2  # so a kill between the two loses nothing


def test_pictures_without_latents_are_not_sampled_again(tmp_path: Path) -> None:
    paths = run(tmp_path, Sampler())
    class_latents.place_of(paths[1]).unlink()
    again = Sampler()
    assert run(tmp_path, again) == paths
    assert again.batches == []


def test_the_batch_size_does_not_change_any_picture(tmp_path: Path) -> None:
    one = run(tmp_path / "one", Sampler(), batch_size=1)
    many = run(tmp_path / "many", Sampler(), batch_size=100)
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in many]


def test_given_pictures_count_and_all_of_them_are_used(tmp_path: Path) -> None:
    given = [tmp_path / f"g{n}.jpg" for n in range(4)]
    sampler = Sampler()
    paths = run(tmp_path / "out", sampler, given=given, count=6)
    assert paths[:4] == tuple(given)
    assert len(paths) == 6
    assert len(sampler.seeds) == 2
    assert run(tmp_path / "none", Sampler(), given=given, count=3) == tuple(given)
    assert not (tmp_path / "none").exists()


def test_a_stopped_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Sampler())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", Sampler(stop_after=2))
    sampler, done = Sampler(), []
    resumed = run(tmp_path / "part", sampler, done=done)
    assert sampler.seeds == [derived_seed(5, 6)]
    assert done == [6, 7]
    assert [p.read_bytes() for p in resumed] == [p.read_bytes() for p in whole]


def test_a_finished_run_samples_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, Sampler())
    sampler = Sampler()
    assert run(tmp_path, sampler) == first
    assert sampler.batches == []


def test_a_damaged_leftover_is_sampled_anew(tmp_path: Path) -> None:
    paths = run(tmp_path, Sampler())
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[: len(data) // 2])
    paths[4].write_bytes(b"")
    (tmp_path / ".class_00001.png.part").write_bytes(b"half")
    sampler = Sampler()
    run(tmp_path, sampler)
    # The two batches that they belong to.
    assert sampler.seeds == [derived_seed(5, index) for index in range(6)]
    assert paths[2].read_bytes() == data


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"seed": 6}])
def test_pictures_of_another_model_prompt_or_seed_are_not_taken(
    tmp_path: Path, change: dict[str, object]
) -> None:
    run(tmp_path, Sampler())
    sampler = Sampler()
    run(tmp_path, sampler, **change)  # type: ignore[arg-type]
    assert len(sampler.seeds) == 7


def test_a_strangers_picture_in_the_folder_is_not_taken(tmp_path: Path) -> None:
    Image.new("RGB", (24, 16), "red").save(tmp_path / "class_00000.png")
    sampler = Sampler()
    run(tmp_path, sampler, count=1)
    assert sampler.seeds == [derived_seed(5, 0)]


def test_black_and_not_finite_pictures_get_further_seeds(tmp_path: Path) -> None:
    sampler, done = Sampler(), []
    sampler.black = {derived_seed(5, 1), derived_seed(5, 1, 1), derived_seed(5, 1, 2)}
    sampler.broken = {derived_seed(5, 4)}
    paths = run(tmp_path, sampler, done=done)
    assert done == list(range(8))
    for index, attempt in ((0, 0), (1, 3), (4, 1)):
        expected = sampler.draw(derived_seed(5, index, attempt))
        assert expected is not None
        assert np.array_equal(pixels(paths[index]), expected)
    again = Sampler()
    run(tmp_path, again)
    assert again.batches == []  # a picture from a later attempt is kept as well


def test_a_picture_refused_every_time_is_one_sentence(tmp_path: Path) -> None:
    sampler = Sampler()
    sampler.broken = {derived_seed(5, 3, attempt) for attempt in range(4)}
    with pytest.raises(DatasetError, match="Class image 3 came out black or not finite with each"):
        run(tmp_path, sampler)
    assert len([seed for seed in sampler.seeds if seed in sampler.broken]) == 4
    assert not (tmp_path / "class_00003.png").exists()
    assert (tmp_path / "class_00004.png").exists()


def test_a_dark_picture_with_something_in_it_is_kept(tmp_path: Path) -> None:
    night = np.zeros((16, 24, 3), np.uint8)
    night[3, 3] = 40
    paths = ensure(
        tmp_path, given=(), count=1, batch_size=1, seed=0, sample=lambda seeds: [sampled(night)]
    )
    assert pixels(paths[0]).max() == 40


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match=r"class_00000\.png cannot be written"):
        run(tmp_path / "file" / "sub", Sampler())


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_a_sampler_of_the_wrong_type_is_our_own_fault(tmp_path: Path, wrong: Pixels) -> None:
    with pytest.raises(ValueError, match="uint8"):
        ensure(
            tmp_path, given=(), count=1, batch_size=1, seed=0, sample=lambda seeds: [sampled(wrong)]
        )
    with pytest.raises(ValueError, match="zip"):
        ensure(tmp_path, given=(), count=1, batch_size=1, seed=0, sample=lambda seeds: [])


def test_derived_seeds_are_stable_distinct_and_of_63_bits() -> None:
    seeds = {derived_seed(s, i, a) for s in (0, 1) for i in range(500) for a in range(4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    # This value must never change, or resumed runs would sample everything again.
    assert derived_seed(0, 0) == 1613241082816453455


def test_what_a_stop_left_missing_is_sampled_in_the_batch_it_belongs_to(tmp_path: Path) -> None:
    whole, again = Sampler(), Sampler()
    paths = run(tmp_path, whole)
    before = paths[3].stat().st_mtime_ns
    paths[4].unlink()  # pictures depend on their batch in the last bits
    run(tmp_path, again)
    assert again.batches == [whole.batches[1]]
    assert paths[3].stat().st_mtime_ns == before


class Group:
    """Processes of two hosts, as threads: 0 and 1 on the first, 2 on the second."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(3, timeout=20)
        self._values: list[Any] = [None] * 3

    def share(self, process: int) -> SamplingShare:
        def gather(value: Any) -> list[Any]:
            self._values[process] = value
            self._barrier.wait()
            gathered = list(self._values)
            self._barrier.wait()
            return gathered

        return SamplingShare(process=process, processes=3, gather=gather, writes=process != 1)


@pytest.mark.parametrize("kept", [0, 2])
def test_processes_of_two_hosts_share_the_batches_and_the_files(kept: int, tmp_path: Path) -> None:
    alone, first, second = (tmp_path / name for name in ("alone", "first", "second"))
    run(alone, Sampler(), count=8)
    run(first, Sampler(), count=kept)
    group, samplers = Group(), [Sampler() for _ in range(3)]
    (second / "latents").mkdir(parents=True)
    (second / "class_00007.png").write_bytes(b"of another run")
    counts: list[list[int]] = [[], [], []]

    def sample(process: int) -> None:
        folder = second if process == 2 else first
        share = group.share(process)
        run(folder, samplers[process], count=8, done=counts[process], share=share)

    threads = [threading.Thread(target=sample, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    seeds = [derived_seed(5, index) for index in range(8)]
    assert [sampler.seeds for sampler in samplers] == [seeds[:3], seeds[3:6], seeds[6:]]
    assert [seen[-1] for seen in counts] == [8, 8, 8]
    for path in (path for path in alone.rglob("*") if path.is_file()):
        name = path.relative_to(alone)
        assert (first / name).read_bytes() == path.read_bytes() == (second / name).read_bytes()
