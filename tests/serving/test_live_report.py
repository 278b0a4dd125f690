"""The page about runs over HTTP: it follows the files of the runs, and ends by Ctrl-C."""

import json
import re
import signal
import subprocess
import sys
import threading

import httpx
import pytest
from evaluation.test_run_report import make_run
from launch import launch

from megamod.errors import UserError
from megamod.serving.address import bind_socket
from megamod.serving.live_report import LivePage, LiveServer


@pytest.fixture
def serve():
    """Function that serves the page of some runs, and returns a client of it."""
    servers = []

    def start(*paths):
        server = LiveServer(LivePage(paths), bind_socket("127.0.0.1", 0))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return httpx.Client(base_url=f"http://127.0.0.1:{server.socket.getsockname()[1]}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get_steps(page: str) -> str:
    """The number of steps in the table of scores."""
    return re.search(r"<td>steps</td><td>(\d+)</td>", page)[1]


def test_the_page_follows_its_run(serve, tmp_path):
    run = make_run(tmp_path / "run", rate=0.1)
    client = serve(run)
    first, version = client.get("/"), client.get("/version").text
    assert first.status_code == 200 and get_steps(first.text) == "3"
    assert f'const shown = "{version}"' in first.text
    assert client.get("/version").text == version and client.get("/").text == first.text
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(run / "metrics.jsonl", "a") as log:
        log.write("\n" + json.dumps(records[0] | {"step": 40, "loss": 0.5}) + "\n")
        log.write('{"step": 50, "lo')  # a line that is being written
    assert client.get("/version").text != version
    second = client.get("/").text
    assert get_steps(second) == "40" and "<td>0.5</td>" in second
    assert client.get("/metrics").status_code == 404


def test_a_run_without_a_step_is_waited_for(serve, tmp_path):
    (tmp_path / "run").mkdir()
    client = serve(tmp_path / "run")
    page = client.get("/")
    assert page.status_code == 200 and "No report yet." in page.text
    assert "has no metrics.jsonl" in page.text and "location.reload()" in page.text
    version = client.get("/version").text
    make_run(tmp_path / "made", rate=0.1)
    (tmp_path / "made" / "metrics.jsonl").rename(tmp_path / "run" / "metrics.jsonl")
    assert client.get("/version").text != version
    assert get_steps(client.get("/").text) == "3"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_by_a_signal(tmp_path, number):
    run = make_run(tmp_path / "run", rate=0.1)
    command = [sys.executable, "-m", "megamod", "report", str(run), "--serve", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        assert get_steps(httpx.get(address, timeout=30).text) == "3"
        process.send_signal(number)
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, output, errors) == (0, "", "")
    assert not (tmp_path / "report.html").exists()


def test_refusals(tmp_path):
    run = make_run(tmp_path / "run", rate=0.1)
    with bind_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in (
            (("--serve", "--port", port), f"--port {port}: Address already in use"),
            (("--serve", "--port", 70000), "--port 70000: 0 to 65535 is allowed"),
            (("--serve", "--output", "a.html"), "--output a.html: --serve writes no file"),
            (("--port", 8000), "--port 8000: is for --serve"),
        ):
            with pytest.raises(UserError, match=message):
                launch("report", run, *words)
