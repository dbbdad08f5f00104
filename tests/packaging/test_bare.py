"""`python scripts/install.py --bare`: a checkout is importable where nothing can be installed."""

import os
import shutil
import site
from pathlib import Path

import pytest

from scripts.install import writable_site
from tests.conftest import ROOT
from tests.packaging.conftest import copy_packages, empty_environment


@pytest.fixture
def checkout(tmp_path):
    """A copy that has lost the committed links."""
    folder = tmp_path / "checkout"
    copy_packages(folder)
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install.py", folder / "scripts")
    return folder


def test_sere_is_imported_from_the_checkout(checkout, run, tmp_path):
    python = empty_environment(tmp_path / "environment")
    for _ in range(2):
        said = run(python, checkout / "scripts" / "install.py", "--bare").stdout
        assert f"{python} now imports sere from {checkout}" in said
        assert "sere-checkout.pth" in said
    (checkout / "conf" / "errors.py").open("a").write("ADDED = 1\n")
    code = "import sere.conf.schema, sere.conf.errors as e\nprint(sere.conf.schema.__file__, e.ADDED)"
    file, added = run(python, "-c", code).stdout.split()
    assert Path(file).resolve() == checkout / "conf" / "schema" / "__init__.py"
    assert added == "1"


def test_users_folder_where_the_other_cannot_be_written(tmp_path, monkeypatch):
    users = tmp_path / "users"
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(users))
    monkeypatch.setattr(os, "access", lambda path, mode: path == users)
    monkeypatch.setattr(site, "ENABLE_USER_SITE", True)
    assert writable_site() == users
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    with pytest.raises(SystemExit, match="use a virtual environment"):
        writable_site()
