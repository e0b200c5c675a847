"""Prepares the folder that a model is written into, and moves the model there.

`__model_info__.json` carries our mark. It is the first entry to be moved into place and the last to
be removed, so at any moment, also after a crash, entries beside the mark are ours. Entries without
the mark are someone else's and are left alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from dreambooth.errors import ModelArtifactError, UserError
from dreambooth.model_folder import layout
from dreambooth.process import files
from dreambooth.process.files import fsync

logger = logging.getLogger(__name__)

# The mark is this key and value in __model_info__.json.
MARK = {"written_by": "dreambooth"}
# In the order in which they are moved into place; removed in the reverse order.
ENTRIES = (
    *(layout.MODEL_INFO, *layout.OTHER_FILES, layout.SAMPLES),
    *("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    *(*layout.OPTIONAL_PARTS, layout.INDEX),
)
PARTIAL = ".partial-"
ELSEWHERE = "choose another folder"


def check(model_dir: Path, *, base_folder: Path | None = None, elsewhere: str = ELSEWHERE) -> None:
    """Create `model_dir`, and test writing unless an earlier model fills it; nothing is removed.

    Raises UserError where a name of ENTRIES is someone else's or the base model lies in here, and
    ResourceError where nothing can be written. elsewhere: how the user chooses another folder, for
    the messages.
    """
    if base_folder is not None and _same_or_inside(base_folder, model_dir):
        raise UserError(
            f"The model would be written over the base model that it starts from ({base_folder}): "
            f"{elsewhere}."
        )
    with disk_faults_named(model_dir, elsewhere):
        model_dir.mkdir(parents=True, exist_ok=True)
        present = _present(model_dir)
        if present and not _is_marked(model_dir):
            raise UserError(
                f"{model_dir} holds {_some(present)}, not written by an earlier run: nothing is "
                f"overwritten or removed; {elsewhere}."
            )
        if not present:
            _probe(model_dir)


def clear(model_dir: Path, *, elsewhere: str = ELSEWHERE) -> None:
    """Remove what an earlier run of ours left in `model_dir`, and test writing.

    Only leftovers (`.partial-*`) and, beside our mark, the names of ENTRIES are removed; all other
    files stay.
    """
    with disk_faults_named(model_dir, elsewhere):
        for leftover in sorted(model_dir.glob(PARTIAL + "*")):
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        for name in reversed(_present(model_dir) if _is_marked(model_dir) else []):
            remove(model_dir / name)
        _probe(model_dir)


def move(stage: Path, model_dir: Path) -> None:
    """Move the entries of a complete, flushed model into place, its index last.

    The old model ends with the first removal, and the new one begins with the last move. What
    someone else has put there since `clear` is set aside, so neither it nor the training is lost.
    """
    strange = [] if _is_marked(model_dir) else _present(model_dir)
    if strange:
        aside = Path(tempfile.mkdtemp(prefix="set-aside-", dir=model_dir))
        logger.warning("%s was not written by us: it is in %s now", _some(strange), aside)
        for name in strange:
            os.replace(model_dir / name, aside / name)
    for name in reversed(ENTRIES):
        if name != layout.MODEL_INFO:  # replaced atomically, to keep the mark
            remove(model_dir / name)
    for name in ENTRIES:
        if (stage / name).exists():
            if name == layout.INDEX:
                fsync(model_dir)
            os.replace(stage / name, model_dir / name)
    fsync(model_dir)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (never its target); do nothing where there is none.

    A folder is renamed first, because others, such as SageMaker's agent, may still write into it.
    """
    if path.is_dir() and not path.is_symlink():
        aside = tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def disk_faults_named(model_dir: Path, elsewhere: str = ELSEWHERE) -> AbstractContextManager[None]:
    """Turn a disk's errors in the block into a ResourceError that says what to do."""
    return files.disk_faults_named(
        "The model",
        model_dir,
        elsewhere=elsewhere,
        smaller="set export_precision=fp16, which halves the model's size",
    )


def _probe(model_dir: Path) -> None:
    """Write a small file, to fail now and not after hours of training."""
    with tempfile.TemporaryDirectory(
        prefix=PARTIAL, dir=model_dir, ignore_cleanup_errors=True
    ) as stage:
        probe = Path(stage) / "probe"
        probe.write_text("a small file, to see whether it can be written\n", encoding="utf-8")
        fsync(probe)


def _present(model_dir: Path) -> list[str]:
    return [name for name in ENTRIES if os.path.lexists(model_dir / name)]


def _is_marked(model_dir: Path) -> bool:
    try:
        info = layout.read_json(model_dir / layout.MODEL_INFO)
    except ModelArtifactError:
        return False
    return all(info.get(key) == value for key, value in MARK.items())


def _same_or_inside(path: Path, folder: Path) -> bool:
    # Path.resolve raises for loops of links; os.path.realpath does not.
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
