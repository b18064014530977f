"""`mobula replay` reports, draws, and says in one line what is wrong."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from typer.testing import CliRunner

from cli.replay import replay

GENERATOR = "poisson:rate=50,minutes=0.01,prompt=fixed(20),output=fixed(3)"
app = typer.Typer()
app.command()(replay)


class Handler(BaseHTTPRequestHandler):
    """Lists one model and streams three tokens; answers 429 to everything of the model `full`."""

    def do_GET(self):
        self._answer(200, b'{"data": [{"id": "tiny"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_a_run_ends_in_a_table_and_a_picture(url, tmp_path):
    result = invoke(GENERATOR, "--url", url, "--plot", str(tmp_path / "run.png"))
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.stdout
    assert "goodput" in result.stdout
    assert (tmp_path / "run.png").exists()


def test_json_is_one_object(url):
    result = invoke(GENERATOR, "--url", url, "--json")
    report = json.loads(result.stdout)
    assert report["completed"] == report["requests"] > 0
    assert report["output_tokens"] == 3 * report["requests"]
    assert report["prompt_tokens"] == 20 * report["requests"]


def test_rejected_requests_exit_with_1(url):
    result = invoke(GENERATOR, "--url", url, "--model", "full")
    assert result.exit_code == 1
    assert "queue full" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "none.csv: No such file"),
        (["poisson:rate=4"], "needs minutes"),
        ([GENERATOR, "--api", "soap"], "--api 'soap'"),
        ([GENERATOR, "--start", "5"], "no request arrives"),
        ([GENERATOR, "--plot", "/nowhere/run.png"], "there is no directory /nowhere"),
        ([GENERATOR, "--url", "http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        ([GENERATOR, "--url", "nonsense"], "--url 'nonsense'"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
