"""Draw the data sets that ship with the embedded model, whose subjects are new to it.

`python -m tiny_world data_sets` writes them into `dreambooth/tiny/data`; with `--masks` each
picture has a mask of its subject beside it, which the shipped ones do not. Each subject is shown
only in a room and on grass, so that prompts with a beach test something new.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dreambooth.settings.command_line import Parser
from dreambooth.tiny import DATA
from tiny_world.world import SUBJECTS, Scene, draw, draw_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """A shipped data set: its folder, its subject and the number of its pictures."""

    folder: str
    subject: str
    pictures: int

    @property
    def instance_prompt(self) -> str:
        """Return the prompt that names the subject by its rare word."""
        return f"a photo of a {self.subject} {SUBJECTS[self.subject].species}"

    @property
    def class_prompt(self) -> str:
        """Return the prompt that names only the class."""
        species = SUBJECTS[self.subject].species
        return f"a photo of {'an' if species[0] in 'aeiou' else 'a'} {species}"

    def scenes(self) -> list[Scene]:
        """Return the scenes of its pictures, alternately in a room and on grass."""
        look = SUBJECTS[self.subject]
        return [
            Scene(
                look=look,
                setting=("room", "grass")[index % 2],
                style="photo",
                seed=f"shipped/{self.subject}/{index}",
                name=self.subject,
            )
            for index in range(self.pictures)
        ]


DATA_SETS = (
    DataSet(folder="cat", subject="riobugger", pictures=8),
    DataSet(folder="dog1_8", subject="Doppler", pictures=8),
    DataSet(folder="dog1_16", subject="Doppler", pictures=16),
    DataSet(folder="dog2_4", subject="zwx", pictures=4),
    DataSet(folder="chair", subject="vorbit", pictures=6),
    DataSet(folder="ottoman", subject="drimel", pictures=6),
)


def write_data_set(data_set: DataSet, folder: Path, *, masks: bool = False) -> None:
    """Write PNG pictures and dataset_info.json into `folder`, which is created if necessary.

    masks: whether to write `NAME.mask.png` beside each picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = {"instance_prompt": data_set.instance_prompt, "class_prompt": data_set.class_prompt}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    for index, scene in enumerate(data_set.scenes()):
        path = folder / f"{data_set.subject.lower()}_{index:02d}.png"
        draw(scene).save(path, optimize=True)
        if masks:
            draw_mask(scene).save(path.with_suffix(".mask.png"), optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the shipped data sets."""
    parser = Parser(prog="python -m tiny_world data_sets", description=main.__doc__)
    parser.add_argument(
        "--data", type=Path, default=DATA, help="where to write (default: %(default)s)"
    )
    parser.add_argument("--masks", action="store_true", help="with masks of the subjects")
    given = parser.parse_args(argv)
    for data_set in DATA_SETS:
        write_data_set(data_set, given.data / data_set.folder, masks=given.masks)
    return 0
