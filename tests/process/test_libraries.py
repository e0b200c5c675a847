from __future__ import annotations

import gc
import importlib.util
import sys
from types import ModuleType

import pytest

from dreambooth.process import libraries


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look as if it had imported neither library."""
    for name in ("diffusers", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("collects", [True, False])
def test_imports_see_no_bitsandbytes_and_no_collections(collects: bool) -> None:
    if not collects:
        gc.disable()
    try:
        with libraries.importing():
            assert not gc.isenabled()
            assert importlib.util.find_spec("bitsandbytes") is None
            with pytest.raises(ImportError):
                importlib.import_module("bitsandbytes")
        assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert "bitsandbytes" not in sys.modules
    assert importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.usefixtures("fresh")
def test_a_failed_import_leaves_everything_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), libraries.importing():
        raise ZeroDivisionError
    assert gc.isenabled()
    assert "bitsandbytes" not in sys.modules


@pytest.mark.usefixtures("fresh")
def test_what_is_imported_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    there = ModuleType("bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", there)
    with libraries.importing():
        assert sys.modules["bitsandbytes"] is there
    assert sys.modules["bitsandbytes"] is there
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    with libraries.importing():
        assert gc.isenabled()
