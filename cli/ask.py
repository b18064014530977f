"""A question to a running fleet's supervisor, over the Unix socket in its directory: one JSON line each way."""

from __future__ import annotations

import socket
from typing import Any, TypeVar

import msgspec

from cli.fleet_home import FleetHome
from cluster import errors
from cluster.errors import MobulaError, Unreachable

ANSWER_S = 15.0  # A controller that restarts is back by then.
MAX_ANSWER_BYTES = 64 * 2**20  # A status of ten thousand replicas is about 10 MB.

Kind = TypeVar("Kind")


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is sent."""

    call: str
    arguments: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What comes back: an answer, or an error by the name of its class."""

    answer: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    kind: str = ""


def ask(home: FleetHome, call: str, kind: type[Kind], /, **arguments: Any) -> Kind:
    """The answer. Raises the error that the fleet answers with, or Unreachable where it does not."""
    question = Question(call=call, arguments=arguments)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(ANSWER_S)
            client.connect(str(home.socket_path))
            client.sendall(msgspec.json.encode(question) + b"\n")
            with client.makefile("rb") as stream:
                answer = msgspec.json.decode(stream.read(MAX_ANSWER_BYTES), type=Answer)
        if not answer.error:
            return msgspec.json.decode(answer.answer, type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise Unreachable(f"fleet {home.path.name} {_why_silent(home, error)}") from error
    raised = getattr(errors, answer.kind, MobulaError)
    raise raised(answer.error)


def _why_silent(home: FleetHome, error: Exception) -> str:
    record = home.record()
    if record is None:
        return f"is not up: {home.record_path} is not there"
    if record.supervisor.find() is None:
        return f"has lost its supervisor; `mobula down {record.fleet}` ends what is left"
    if not home.socket_path.exists():
        return "is still starting"
    return f"does not answer at {home.socket_path}: {error}"
