from __future__ import annotations

from dreambooth.data.seeds import derive_seed


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "instance", "sample", 0) == 5206052353887073258
    assert derive_seed(7, "class", "order", 2) == 1656137732142274694
    assert derive_seed(0, "a", 1) != derive_seed(0, "a1")
