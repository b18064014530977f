"""Why one request went where it did: every term of its route, and its times, from the gateway's request log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.ask import ask
from cli.figures import figure
from cli.fleet_home import FleetHome
from cli.patience import patience
from cluster.errors import InvalidConfig, InvalidRequest
from cluster.fleet import Fleet
from cluster.record import CandidateRecord, RequestRecord

MOST_RECORDS = 128  # One HTTP request may have that many choices.
EVEN_S = 1e-6  # Scores this near are equal, and loads and turns have decided.
TIMES = ("queue_s", "prefill_s", "transfer_s", "decode_s", "ttft_s", "tpot_s", "e2e_s")


def explain_request(request_id: str, home: FleetHome, *, as_json: bool) -> None:
    """Print what the log says. Raises InvalidConfig where no log is written, InvalidRequest where the request is not in it."""
    fleet = fleet_of(home)
    if fleet.gateway.request_log is None:
        raise InvalidConfig(f"fleet {fleet.name} writes no request log: set gateway.request_log in cluster.yaml to a directory")
    directory = Path(fleet.gateway.request_log)
    records = find(directory, request_id)
    if not records:
        raise InvalidRequest(f"request {request_id} is not in the request log {directory}: it has not ended, or is too old")
    if as_json:
        typer.echo(msgspec.json.encode(records))
    else:
        Console(highlight=False).print(Group(*(shown(record) for record in records)))


def fleet_of(home: FleetHome) -> Fleet:
    """What the fleet was started with; of a running one, what is in force."""
    if home.record() is None and home.config_path.is_file():
        return msgspec.json.decode(home.config_path.read_bytes(), type=Fleet)
    return ask(home, "fleet", Fleet)


def find(directory: Path, request_id: str) -> list[RequestRecord]:
    """The request of that id, or all choices of the answer or HTTP request of that id. Newest files first, as far as needed."""
    files = sorted(directory.glob("requests-*.jsonl*"), key=lambda path: -path.stat().st_mtime)
    with patience("reading the request log") as told:
        for done, path in enumerate(files):
            told(done, len(files))
            found = [record for _, record in zip(range(MOST_RECORDS), _in_file(path, request_id), strict=False)]
            if found:
                return found
    return []


def _in_file(path: Path, request_id: str) -> Iterator[RequestRecord]:
    """Lines that a crash has cut short are left out."""
    needle = f'"{request_id}'.encode()
    with path.open("rb") as lines:
        for line in lines:
            if needle not in line:
                continue
            try:
                record = msgspec.json.decode(line, type=RequestRecord)
            except msgspec.DecodeError:
                continue
            if request_id in (record.request_id, record.request_id.rpartition("-")[0], record.http_request_id):
                yield record


def shown(record: RequestRecord) -> RenderableType:
    """One request to read."""
    head = Text(f"Request {record.request_id}", style="bold")
    lengths = f"{record.prompt_tokens} prompt tokens, {record.output_tokens} output tokens"
    cached = "" if record.cached_tokens is None else f", {record.cached_tokens} of the prompt cached"
    head.append(f"  {record.outcome}: {record.model}, {lengths}{cached}", style="not bold")
    parts: list[RenderableType] = [head]
    if record.error:
        parts.append(Text(f"error: {record.error}", style="red"))
    parts.append(_times(record))
    route = record.route
    if route is None:
        return Group(*parts, Text("It never had a route: it waited for a replica with room.", style="dim"))
    parts.append(Text(f"{route.reason or 'routed'}; attempt {record.attempts}, tried {', '.join(record.replicas)}"))
    predicted = f"predicted TTFT {_amount('ttft_s', route.predicted_ttft_s)}, TPOT {_amount('tpot_s', route.predicted_tpot_s)}"
    parts.append(Text(predicted))
    parts += [Text(""), *_candidates("decode", route.decode, route.decode_runner_up)]
    if route.prefill is not None:
        parts += [Text(""), *_candidates("prefill", route.prefill, route.prefill_runner_up)]
    elif (other := route.prefill_runner_up) is not None:
        parts.append(Text(f"prefilled elsewhere it would have been on {other.replica_id}: {_terms(other)}"))
    return Group(*parts)


def _times(record: RequestRecord) -> Text:
    known = ((name, getattr(record, name)) for name in TIMES)
    return Text(", ".join(f"{_label(name)} {_amount('_s', value)}" for name, value in known if value is not None) or "no times")


def _candidates(role: str, winner: CandidateRecord, runner_up: CandidateRecord | None) -> tuple[Text, Table]:
    """Terms side by side, those in which the two differ most first, without those that are nothing."""
    both = [winner] if runner_up is None else [winner, runner_up]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("term")
    for candidate in both:
        table.add_column(candidate.replica_id, justify="right", overflow="fold")

    def apart(name: str) -> float:
        return abs(both[0].terms[name] - both[-1].terms.get(name, 0.0))

    for name in sorted(winner.terms, key=lambda name: -apart(name)):
        values = [candidate.terms.get(name, 0.0) for candidate in both]
        if any(values):
            table.add_row(_label(name), *(_amount(name, value) for value in values))
    table.add_row("score", *(_amount("_s", candidate.score) for candidate in both), style="bold")
    return Text(f"{role} on {winner.replica_id}; {_margin(winner, runner_up)}"), table


def _margin(winner: CandidateRecord, runner_up: CandidateRecord | None) -> str:
    if runner_up is None:
        return "there was no runner-up"
    margin_s = runner_up.score - winner.score
    if margin_s < 0:
        return f"{runner_up.replica_id} has the better score and was put behind, see its terms"
    if margin_s < EVEN_S:
        return f"{runner_up.replica_id} was as good"
    return f"{runner_up.replica_id} would have won with {_amount('_s', margin_s)} less"


def _terms(candidate: CandidateRecord) -> str:
    return ", ".join(f"{_label(name)} {_amount(name, value)}" for name, value in candidate.terms.items() if value)


def _label(name: str) -> str:
    words = name.removesuffix("_s").replace("_", " ")
    return words.upper() if words in ("ttft", "tpot") else words


def _amount(name: str, value: float) -> str:
    """Seconds in milliseconds below one; other things as they are."""
    if not name.endswith("_s"):
        return figure(value)
    return f"{value * 1000:.1f} ms" if abs(value) < 1.0 else f"{value:.2f} s"
