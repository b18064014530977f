"""What the supervisor answers to the commands: most of it the controller's words, some its own."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import msgspec

from cli.ask import Answer, Question
from cli.faults import Faults
from cluster.errors import InvalidRequest, MobulaError, Unreachable
from cluster.fleet import Fleet
from cluster.snapshot import Hold
from controller.config import check
from controller.reload import check_reload, differences
from controller.status import FleetStatus

if TYPE_CHECKING:
    from controller.controller_client import ControllerClient  # Imports Ray, which reads its environment once.

log = logging.getLogger("mobula")

CONTROLLER_S = 12.0  # In which a controller that died is up again.
RETRY_S = 0.25
MAX_QUESTION_BYTES = 2 * 2**20  # A config is at most 1 MiB.


class Answerer:
    """One question to a connection."""

    def __init__(self, url: str, controller: ControllerClient, faults: Faults) -> None:
        self._url, self._controller, self._faults = url, controller, faults

    async def serve(self, path: Any) -> None:
        await asyncio.start_unix_server(self._answer, path, limit=MAX_QUESTION_BYTES)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = msgspec.json.decode(await reader.readline(), type=Question)
            answer = Answer(answer=msgspec.Raw(msgspec.json.encode(await self._said(question))))
        except MobulaError as error:
            answer = Answer(error=str(error), kind=type(error).__name__)
        except (ValueError, TypeError, msgspec.MsgspecError) as error:
            answer = Answer(error=f"not a question: {error}", kind="InvalidRequest")
        except Exception as error:
            log.exception("a question failed")
            answer = Answer(error=f"{type(error).__name__}: {error}", kind="Unreachable")
        try:
            writer.write(msgspec.json.encode(answer))
            await writer.drain()
        except ConnectionError:
            log.info("whoever asked is gone")
        finally:
            writer.close()

    async def _said(self, question: Question) -> Any:
        arguments = question.arguments
        match question.call:
            case "status":
                return await self._status()
            case "hold":
                return await self._ask("hold", msgspec.convert(arguments["hold"], Hold))
            case "unhold":
                return await self._ask("unhold", tuple(arguments["kinds"]), arguments["target"])
            case "fleet":
                return await self._ask("fleet")
            case "reload":
                return await self._reload(msgspec.convert(arguments["fleet"], Fleet))
            case "chaos":
                return await self._chaos(**arguments)
            case _:
                raise InvalidRequest(f"{question.call} is nothing that is answered")

    async def _status(self) -> FleetStatus:
        return msgspec.structs.replace(await self._ask("status"), url=self._url)

    async def _reload(self, fleet: Fleet) -> list[str]:
        """What changed."""
        old = await self._ask("fleet")
        check(fleet)
        check_reload(old, fleet)
        await self._ask("reload", fleet)
        return [str(one) for one in differences(old, fleet)]

    async def _chaos(self, what: str, target: str = "", kind: str = "", factor: float = 1.0, seconds: float = 0.0) -> str:
        match what:
            case "kill":
                return self._faults.kill(kind, target, await self._status())
            case "hang":
                return self._faults.hang(target, seconds, await self._status())
            case "slow":
                await self._ask("slow", target, factor)
                return f"steps of {target} last {factor:g} times as long from now on"
            case "stop-prometheus":
                return await self._faults.stop_prometheus()
            case _:
                raise InvalidRequest(f"chaos {what} is not known")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Of the controller, which may be restarting."""
        last: Exception | None = None
        try:
            async with asyncio.timeout(CONTROLLER_S):
                while True:
                    try:
                        return await self._controller.call(method, *arguments)
                    except Unreachable as error:
                        last = error
                    except MobulaError:
                        raise
                    except OSError as error:
                        if error.errno is None or isinstance(error, (ConnectionError, TimeoutError)):
                            last = error
                        else:  # It answers: that it cannot.
                            raise Unreachable(f"the controller cannot do it now: {error}") from error
                    except Exception as error:
                        last = error
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise Unreachable(f"the controller does not answer: {last or 'no word from it'}") from last
