"""Turn an iPhone's HEIC picture into a PNG, in a process of its own.

Nothing else of ours reads HEIC, and what reads it here is a library in C++ that meets a stranger's
file: it may take a process with it, which must not be the page's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dreambooth.limits import LIMITS, Limits
from dreambooth.process import child_process

_DECODE_S: Final = 60.0


def replace_by_png(path: Path, *, limits: Limits = LIMITS) -> bool:
    """Replace a file in HEIC by the same picture as a PNG; return whether that worked.

    It does not where the library is missing, the file is damaged, or the picture too large.
    """
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    part = path.with_name(f"{path.name}.png")
    words = (str(path), str(part), str(limits.max_image_pixels), str(limits.max_image_side_pixels))
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "dreambooth.studio.heic", *words],
            env=child_process.environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_DECODE_S,
            check=False,
        )
        if done.returncode == 0:
            os.replace(part, path)
            return True
    part.unlink(missing_ok=True)
    return False


def main(argv: Sequence[str]) -> int:
    """Read the HEIC file argv[0] and write the PNG argv[1]; argv[2:] are the largest sizes."""
    import pillow_heif

    picture = pillow_heif.open_heif(argv[0], convert_hdr_to_8bit=True)
    width, height = picture.size
    most_pixels, longest_side = map(int, argv[2:])
    if width * height > most_pixels or max(width, height) > longest_side:
        return 1
    image = picture.to_pillow()  # upright: HEIC turns pictures while it decodes
    colours = image.info.get("icc_profile")
    image.convert("RGB").save(argv[1], "PNG", compress_level=1, icc_profile=colours)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
