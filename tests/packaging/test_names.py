"""The packages have one name each, `sere.NAME`, wherever Python is started."""

import sys

import pytest

from tests.conftest import ROOT
from tests.packaging.conftest import PACKAGES


def test_bare_names_are_nobody_elses_business(installed, run):
    code = f"import importlib.util\nprint([name for name in {PACKAGES!r} if importlib.util.find_spec(name)])"
    for python in (installed, sys.executable):
        assert run(python, "-c", code).stdout == "[]\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_bare_name_is_refused_in_the_checkout(name, run):
    result = run(sys.executable, "-c", f"import {name}", cwd=ROOT, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith(f"this folder is the package sere.{name}: import that (see Install in the README)\n")
