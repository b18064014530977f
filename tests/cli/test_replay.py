"""`mobula replay` reports, draws, and says in one line what is wrong."""

import json
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from cli.main import main
from cli.replay import allow_open_files
from cluster.errors import InvalidConfig
from cluster.record import TraceRow, to_line
from workloads.client import run

GENERATOR = "poisson:rate=50,minutes=0.01,prompt=fixed(20),output=fixed(3)"


LISTS = {
    "/v1/models": b'{"data": [{"id": "tiny"}, {"id": "full"}]}',
    "/page/v1/models": b"<html>",
    "/none/v1/models": b'{"data": []}',
}


class Handler(BaseHTTPRequestHandler):
    """Lists two models and streams three tokens; answers 429 to everything of the model `full`. Keeps what was asked."""

    bodies: ClassVar[list[dict]] = []

    def do_GET(self):
        lists = {
            "/v1/models": b'{"data": [{"id": "tiny"}, {"id": "full"}]}',
            "/page/v1/models": b"<html>",
            "/none/v1/models": b'{"data": []}',
        }
        body = lists.get(self.path)
        self._answer(200, body) if body else self._answer(404, b"no such page")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if body["model"] == "full":
            self._answer(429, b'{"error": {"message": "queue full"}}')
            return
        events = [{"choices": [{"text": "a", "finish_reason": None}]}] * body["max_tokens"]
        events.append({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}})
        self._answer(200, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n")

    def _answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def invoke(capsys):
    """Runs the command as a shell would: exit code, stdout, stderr."""

    def invoke(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["replay", *arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return invoke


def test_a_run_ends_in_a_table_and_a_picture(invoke, url, tmp_path):
    code, out, err = invoke(GENERATOR, "--url", url, "--plot", str(tmp_path / "run.png"))
    assert code == 0, err
    assert "TTFT" in out
    assert "goodput" in out
    assert (tmp_path / "run.png").exists()


def test_json_is_one_object(invoke, url):
    _, out, _ = invoke(GENERATOR, "--url", url, "--json")
    report = json.loads(out)
    assert report["completed"] == report["requests"] > 0
    assert report["output_tokens"] == 3 * report["requests"]
    assert report["prompt_tokens"] == 20 * report["requests"]


def test_the_report_says_what_was_sent_and_how_it_was_scaled(invoke, url, tmp_path):
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,400,30\n2023-11-16 18:30:00,400,30\n")
    scale = ["--scale-prompt", "0.1", "--scale-output", "0.1", "--max-tokens", "2"]
    _, out, _ = invoke(str(trace), "--minutes", "5", *scale, "--url", url, "--json")
    report = json.loads(out)
    assert report["workload"] == f"{trace}, minutes 0 to 5: prompts x 0.1, outputs x 0.1, outputs of at most 2 tokens"
    assert report["target"] == f"tiny at {url}"
    assert (report["requests"], report["prompt_tokens"], report["output_tokens"]) == (1, 40, 2)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [([], 5), (["--max-priority", "0"], None), (["--key", "k"], None), (["--key", "k", "--max-priority", "3"], 3)],
)
def test_priorities_of_a_trace_are_asked_for_as_far_as_the_key_may(invoke, url, tmp_path, arguments, asked):
    trace = tmp_path / "urgent.jsonl"
    trace.write_bytes(to_line(TraceRow(arrival_s=0.0, prompt_tokens=5, output_tokens=1, priority=5)))
    assert invoke(str(trace), "--url", url, *arguments)[0] == 0
    assert Handler.bodies[-1].get("priority") == asked


def test_rejected_requests_exit_with_1(invoke, url):
    code, _, err = invoke(GENERATOR, "--url", url, "--model", "full")
    assert code == 1
    assert "rejected (429): " in err
    assert "queue full" in err


def test_a_url_may_end_in_v1(invoke, url):
    assert invoke(GENERATOR, "--url", f"{url}/v1/")[0] == 0


def test_an_interrupted_run_reports_what_has_ended(invoke, url, monkeypatch):
    def interrupt(rows, target, load, on_sample):
        def note(sample):
            signal.raise_signal(signal.SIGINT)
            on_sample(sample)

        return run(rows, target, load, note)

    monkeypatch.setattr("workloads.client.run", interrupt)
    code, out, err = invoke("poisson:rate=5,minutes=10,prompt=fixed(20),output=fixed(3)", "--url", url, "--json")
    assert code == 130
    assert "stopped: of " in err
    assert json.loads(out)["completed"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv: No such file"),
        (["poisson:rate=4"], "needs minutes"),
        ([GENERATOR, "--start", "5"], "no request arrives"),
        ([GENERATOR, "--plot", "/nowhere/run.png"], "there is no directory /nowhere"),
        ([GENERATOR, "--url", "nonsense"], "--url 'nonsense' does not begin with http"),
        ([GENERATOR, "--url", "http://127.0.0.1:99999"], "--url 'http://127.0.0.1:99999' is no"),
        ([GENERATOR, "--url", "URL", "--model", "gpt"], "--model gpt is none of those at URL: tiny, full"),
        ([GENERATOR, "--url", "URL/page"], "did not answer with a list of models but with b'<html>'"),
        ([GENERATOR, "--url", "URL/none"], "lists no model"),
        ([GENERATOR, "--url", "URL/absent"], "answered 404: no such page"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(invoke, url, arguments, message):
    code, _, err = invoke(*(argument.replace("URL", url) for argument in arguments))
    assert code == 2
    assert message.replace("URL", url) in err
    assert err.count("\n") == 1


def test_a_server_that_is_down_exits_with_75(invoke):
    code, _, err = invoke(GENERATOR, "--url", "http://127.0.0.1:1")
    assert code == 75
    assert "no server answers at http://127.0.0.1:1" in err


def test_an_unknown_api_is_refused_with_the_known_ones(invoke):
    code, _, err = invoke(GENERATOR, "--api", "soap")
    assert code == 2
    assert "completions" in err


def test_more_sockets_than_the_system_allows_are_refused(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 512))
    with pytest.raises(InvalidConfig, match="--max-in-flight 449 is above 448, which the limit of 512 open files leaves"):
        allow_open_files(449)


def test_the_limit_on_open_files_is_raised_where_the_system_allows(monkeypatch):
    raised = []
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda which, limits: raised.append(limits))
    allow_open_files(1024)
    assert raised == [(1088, 4096)]
