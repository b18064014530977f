"""Every error a caller may want to tell apart.

MobulaError
├── Temporary               worth trying again after `delay_s`
│   ├── Overloaded          a queue, window or pool is at its bound
│   ├── Unreachable         a peer does not answer, or its stream broke
│   └── Draining            the replica finishes what it has and takes nothing new
└── Permanent               the same call will fail again
    ├── InvalidRequest      a client's request is out of bounds; `param` names the field
    ├── DeadlineExceeded    a request had no token by its own deadline
    ├── InvalidConfig       an operator's file or flag is out of bounds
    ├── InvalidModel        a checkpoint is missing, truncated or of an unsupported kind
    ├── InvalidTrace        a trace file's line does not parse
    ├── Fenced              an order or a worker whose time is over: another has taken its place
    ├── ProtocolMismatch    a peer speaks another version, or sent a broken message
    └── NotAllowed          a key or a shared secret is missing or wrong

A message names the value, the bound and the place: `max_tokens 9000 above 4096, the context of tiny-dense`.
"""

from __future__ import annotations

import re


class MobulaError(Exception):
    """Root of everything Mobula raises on purpose."""


class Temporary(MobulaError):
    """May succeed when tried again. `delay_s`: seconds after which trying makes sense, >= 0."""

    def __init__(self, message: str, *, delay_s: float = 1.0) -> None:
        super().__init__(message)
        self.delay_s = delay_s


class Overloaded(Temporary):
    """A queue, window or pool is at its bound."""


class Unreachable(Temporary):
    """A peer does not answer, or its stream broke."""


class Draining(Temporary):
    """The replica finishes what it has and takes nothing new."""


class Permanent(MobulaError):
    """The same call will fail again."""


class InvalidRequest(Permanent):
    """A client's request is out of bounds. `param`: the field at fault, `code`: OpenAI's short name for the fault."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class DeadlineExceeded(Permanent):
    """A request had no token by its own deadline: nobody waits for the answer any more."""


class InvalidConfig(Permanent):
    """An operator's file or flag is out of bounds."""


class InvalidModel(Permanent):
    """A checkpoint is missing, truncated or of an unsupported kind."""


class InvalidTrace(Permanent):
    """A trace file's line does not parse."""


class Fenced(Permanent):
    """An order or a worker whose time is over: another has taken its place."""


class ProtocolMismatch(Permanent):
    """A peer speaks another version, or sent a broken message."""


class NotAllowed(Permanent):
    """A key or a shared secret is missing or wrong."""


def error_in(report: str) -> MobulaError | None:
    """The error whose type and message end a process's report of its death, a traceback; None where it is none of these."""
    last = report.strip().rpartition("\n")[2]
    told = re.search(rf"\b{re.escape(__name__)}\.(\w+): (.+)", last)
    kind = told and globals().get(told[1])
    return kind(told[2]) if told and isinstance(kind, type) and issubclass(kind, MobulaError) else None
