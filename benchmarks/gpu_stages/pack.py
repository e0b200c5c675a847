"""Pack the Python packages that a GPU machine without a network lacks into one file.

The wheels are downloaded for the other machine's Python, in the versions of requirements.txt.
bitsandbytes brings a library for each CUDA version, of which one is kept.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_stages.running import ROOT
from dreambooth.errors import UserError
from dreambooth.limits import size_in_words

FILE_NAME = "packages.zip"
LIMIT_BYTES = 64 * 2**20
# What machines with torch, transformers, accelerate and pytest usually lack.
LACKING = ("diffusers", "bitsandbytes", "starlette", "uvicorn", "httptools")
# pip takes a wheel only if its tag is given to the letter.
_PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
)

_USE = """\
{file}: {size}, for Python {python} on x86-64 with torch for CUDA {cuda}. It holds
{names}.
Carry it to the GPU machine beside a checkout of the project (and train_dreambooth.py, if it is to
run beside ours), and run there, in the checkout:
  python -m benchmarks gpu --out DIR --packages {name}"""


def write(folder: Path, *, python: str, cuda: str, limit_bytes: int = LIMIT_BYTES) -> str:
    """Write packages.zip into the folder; return how to use it.

    Raises UserError without a network, for a CUDA version that bitsandbytes has no library for,
    and if the file would be larger than what may be carried.
    """
    pins = [*_pins((ROOT / "requirements.txt").read_text("utf-8"))]
    with tempfile.TemporaryDirectory(prefix="wheels-") as place:
        download(pins, Path(place), python=python)
        wheels = sorted(Path(place).glob("*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        merge(wheels, path, cuda=cuda)
    size = path.stat().st_size
    if size > limit_bytes:
        path.unlink()
        raise UserError(
            f"The packages take {size_in_words(size)}, and {size_in_words(limit_bytes)} may be "
            "carried: nothing was written."
        )
    return _USE.format(
        file=path,
        size=size_in_words(size),
        python=python,
        cuda=cuda,
        names=", ".join(pins),
        name=path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name,
    )


def _pins(requirements: str) -> Iterator[str]:
    """Yield NAME==VERSION of each package that is to be packed."""
    for name in LACKING:
        pin = re.search(rf"^{re.escape(name)}==\S+", requirements, re.MULTILINE)
        assert pin, f"requirements.txt does not name {name}"
        yield pin[0]


def download(pins: Sequence[str], folder: Path, *, python: str) -> None:
    """Download wheels for another Python. Raises UserError if pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [*(f"--platform={name}" for name in _PLATFORMS), f"--dest={folder}", *pins]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        said = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"pip cannot download {', '.join(pins)} for Python {python}: pack on a machine that "
            f"reaches a package index. pip says: {said[-1] if said else 'nothing'}"
        )


def merge(wheels: Sequence[Path], path: Path, *, cuda: str) -> None:
    """Write the contents of all wheels into one archive, to be unpacked into one folder.

    Of bitsandbytes' libraries those for the CUDA version and for a CPU are kept; raises UserError
    if there is none for this version.
    """
    library = f"_cuda{cuda.replace('.', '')}.so"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as whole:
                names = whole.namelist()
                if wheel.name.startswith("bitsandbytes-"):
                    if not any(name.endswith(library) for name in names):
                        raise UserError(f"{wheel.name} has no library for CUDA {cuda}.")
                    names = [name for name in names if _is_kept(name, library)]
                for name in names:
                    packed.writestr(whole.getinfo(name), whole.read(name), zipfile.ZIP_DEFLATED)


def _is_kept(name: str, library: str) -> bool:
    return not name.endswith(".so") or name.endswith((library, "_cpu.so"))


def unpack(path: Path, folder: Path) -> Path:
    """Unpack what `write` wrote into the folder, and return the folder."""
    try:
        with zipfile.ZipFile(path) as packed:
            packed.extractall(folder)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is no archive that `gpu pack` wrote: {error}.") from error
    return folder
