"""Turn what the user gives as a path into a path, and refuse addresses (`scheme://...`).

Taken as a path, `s3://bucket/model` would name a local folder `s3:`, and what is written there
would be lost with the machine. `file://` addresses are paths, as SageMaker's local mode writes
them. Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from dreambooth.errors import UserError, quoted

# One slash is enough, as pathlib shortens s3://bucket to s3:/bucket. One letter is a drive (C:/).
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):(/+)", re.ASCII)
_FILE = "file"


def is_remote(text: str) -> bool:
    """Return whether a text is an address of something outside this machine."""
    found = _ADDRESS.match(text)
    return found is not None and found[1].lower() != _FILE


def to_path(text: str, what: str) -> Path:
    """Return the path that a text names: `~` expanded, `file://` removed and its %20 decoded.

    what: the option that the text comes from, for the message. Raises UserError for every other
    address, and for a text that cannot be a path.
    """
    if is_remote(text):
        raise UserError(
            f"{what} is the address {quoted(text)}, and only paths of this machine can be used: "
            "give the path of a local file or folder, and copy from or to the address yourself."
        )
    found = _ADDRESS.match(text)
    path = text
    if found is not None:
        path = text[found.end() :].rstrip()
        host = ""
        if len(found[2]) == 2:  # file://HOST/PATH; a host such as `.` begins a relative path
            host, slash, path = path.partition("/")
            host, path = "" if host.lower() == "localhost" else host, slash + path
        else:  # file:/PATH, and file:///PATH
            path = f"/{path}"
        path = unquote(host + path)
    if "\0" in path or (found is not None and not path.strip("/")):
        raise UserError(f"{what} must be the path of a file or folder, not {quoted(text)}.")
    return Path(os.path.expanduser(path))
