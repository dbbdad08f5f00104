"""A folder for weights that a worker has to rewrite to read them from disk: up to the model's size, so nothing stays behind."""

import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "sere-offload-"
# In the folder: the process whose it is.
_OWNER = "owner.pid"


def offload_folder(parent: str | None) -> tempfile.TemporaryDirectory:
    """A folder for this process. Those of processes that were killed are removed.

    Args:
        parent: Where to make it; None: the system's temporary folder.
    """
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    for other in place.glob(f"{_PREFIX}*"):
        if _is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place)
    Path(made.name, _OWNER).write_text(str(os.getpid()))
    return made


def _is_abandoned(folder: Path) -> bool:
    try:
        owner = int((folder / _OWNER).read_text())
    except (OSError, ValueError):
        # Another user's, or one that is just being made.
        return False
    return not Path("/proc", str(owner)).exists()
