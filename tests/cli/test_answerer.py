"""What the supervisor says when the controller cannot."""

from __future__ import annotations

import errno

import pytest

from cli.answerer import Answerer
from cluster.errors import Unreachable


class Controller:
    """Raises one error after another, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)

    async def call(self, method: str, *arguments: object) -> str:
        if self._errors:
            raise self._errors.pop(0)
        return f"{method} is done"


async def test_a_controller_that_is_restarting_is_asked_again():
    answerer = Answerer("", Controller(ValueError("no actor"), ConnectionResetError(), TimeoutError()), None)
    assert await answerer._ask("reload") == "reload is done"


async def test_a_disk_that_is_full_is_told_at_once_and_not_as_silence():
    answerer = Answerer("", Controller(OSError(errno.ENOSPC, "No space left on device")), None)
    with pytest.raises(Unreachable, match=r"^the controller cannot do it now: \[Errno 28\] No space left on device$"):
        await answerer._ask("reload")
