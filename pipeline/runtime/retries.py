"""Asking a storage again: which of its failures may pass, and for how long that is waited for."""

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from sere.conf.errors import ConfigError, TryAgainError
from sere.conf.masking import mask_uri

PATIENCE_S = 60.0
"""A storage that answers again within this time was not away. Longer than a restart of a server, or a change of network."""
# Asked again they would answer the same; some are mistakes of this program.
_FINAL = (
    ConfigError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ImportError,
    AssertionError,
    MemoryError,
)
# A full or read-only disk does not mend itself within a minute, and a name that is refused stays refused.
_FINAL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EFBIG}
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment. Storages have errors of their own: any may that is not known not to."""
    if not isinstance(error, Exception) or isinstance(error, _FINAL):
        return False
    return not (isinstance(error, OSError) and error.errno in _FINAL_NUMBERS)


def patiently(call: Callable[[], _Result], *, what: str, patience_s: float = PATIENCE_S) -> _Result:
    """The result of a call that may be made any number of times.

    Args:
        call: Reads or writes something whole.
        what: It is, for the log.
        patience_s: Seconds after which its error is raised.

    Raises:
        TryAgainError: if it fails for so long.
        ConfigError: if it fails in a way that does not pass.
    """

    def say(state: RetryCallState) -> None:
        # Once: the next line is that it works, or an error.
        if state.attempt_number == 2 and state.outcome is not None:
            _log.warning("%s: %s; tried again for %g s", what, mask_uri(str(state.outcome.exception())), patience_s)

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(patience_s),
        wait=wait_exponential_jitter(multiplier=min(0.2, patience_s / 10), max=10, jitter=min(0.2, patience_s / 10)),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(call)
    except ConfigError:
        raise
    except Exception as error:
        reason = mask_uri((str(error).strip() or type(error).__name__).splitlines()[0])
        if may_pass(error):
            remedy = "run the same command again when the storage answers"
            raise TryAgainError(f"{what} cannot be used ({reason}): {remedy}") from error
        raise ConfigError(
            f"{what} cannot be used ({reason}): mend that, and run the same command again; what is finished is kept"
        ) from error
