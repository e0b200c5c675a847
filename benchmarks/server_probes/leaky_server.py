"""Run `dreambooth serve` with a planted leak that the soak must catch: it keeps every reply's
bytes.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from dreambooth.__main__ import main
from dreambooth.serving.contract import reply

_KEPT: Final[list[bytes]] = []
_encode: Final = reply.encode


def _encode_and_keep(*args: Any, **keywords: Any) -> tuple[bytes, str]:
    content, media_type = _encode(*args, **keywords)
    _KEPT.append(content)
    return content, media_type


if __name__ == "__main__":
    reply.encode = _encode_and_keep
    sys.exit(main(sys.argv[1:]))
