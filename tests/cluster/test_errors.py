from __future__ import annotations

import re
import traceback

import pytest

from cluster import errors

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.MobulaError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_error_is_temporary_or_permanent_and_not_both(kind: type[errors.MobulaError]) -> None:
    if kind is not errors.MobulaError:
        assert issubclass(kind, errors.Temporary) != issubclass(kind, errors.Permanent)
        assert kind.__doc__


def test_the_drawing_shows_the_whole_tree() -> None:
    drawn = re.findall(r"^[│ ]*(?:[├└]── )?([A-Z]\w+)(?:\s{2,}|$)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in ALL)


def test_a_temporary_error_says_when_to_try_again() -> None:
    assert errors.Overloaded("full", delay_s=0.25).delay_s == 0.25
    assert errors.Unreachable("gone").delay_s > 0


def test_an_invalid_request_names_field_and_code() -> None:
    refused = errors.InvalidRequest("too long", param="max_tokens", code="context_length_exceeded")
    assert (str(refused), refused.param, refused.code) == ("too long", "max_tokens", "context_length_exceeded")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_is_read_again_from_its_traceback(kind: type[errors.MobulaError]) -> None:
    try:
        raise kind("gateway.port 8000: taken") from ValueError("of another kind")
    except errors.MobulaError as raised:
        told = errors.error_in("a replica has failed:\n" + "".join(traceback.format_exception(raised)))
    assert (type(told), str(told)) == (kind, "gateway.port 8000: taken")


@pytest.mark.parametrize(
    "report",
    ["", "killed", "ValueError: x", "cluster.errors.Absent: x", "cluster.errors.re: x", "cluster.errors.Draining: x\nOSError: y"],
)
def test_no_error_is_read_where_the_last_line_tells_none_of_ours(report: str) -> None:
    assert errors.error_in(report) is None
