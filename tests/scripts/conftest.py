"""The scripts of `scripts/demo_model` import each other by plain names, as they do when one of them is run."""

import sys

import pytest

from tests.conftest import ROOT

DEMO_MODEL_SCRIPTS = ROOT / "scripts" / "demo_model"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO_MODEL_SCRIPTS))
    yield
    for script in DEMO_MODEL_SCRIPTS.glob("*.py"):
        sys.modules.pop(script.stem, None)
