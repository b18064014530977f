"""Stands in for a fleet's supervisor: answers each question on the Unix socket from a table, and remembers what it was asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import psutil

from cli.ask import Answer, Question
from cli.fleet_home import FleetHome, Record, identify


class FakeAnswerer:
    """A fleet of that name is up, as far as a client can tell, inside `with`."""

    def __init__(self, fleet: str, answers: Mapping[str, Callable[[dict[str, Any]], Any]]) -> None:
        self.asked: list[Question] = []
        self._answers = answers
        self._home = FleetHome(fleet)

    def __enter__(self) -> FakeAnswerer:
        self._home.make()
        self._home.write_record(Record(fleet=self._home.path.name, supervisor=identify(psutil.Process()), url="http://127.0.0.1:1"))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._home.socket_path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:  # Shut down.
                return
            with client, client.makefile("rwb") as stream:
                question = msgspec.json.decode(stream.readline(), type=Question)
                self.asked.append(question)
                answer = self._answers[question.call](question.arguments)
                stream.write(msgspec.json.encode(Answer(answer=msgspec.Raw(msgspec.json.encode(answer)))))
