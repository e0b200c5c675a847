from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
TEXT, JSON = "application/x-text", "application/json"
PATIENCE_S = 300  # only guards against a hang
SHORT = {"prompt": "a cat", "num_inference_steps": 2, "seed": 7}
LONG = {"prompt": "a cat", "num_inference_steps": 900}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def attributes(self) -> dict[str, str]:
        told = self.headers["x-amzn-sagemaker-custom-attributes"]
        return dict(part.split("=", 1) for part in told.split(";"))


@dataclass
class Server:
    """`python -m dreambooth serve` in a process of its own, on a free port."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    early: list[Reply] = field(default_factory=list)
    port: int = 0

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            start = time.monotonic()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            reply = connection.getresponse()
            told = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, told, reply.read(), time.monotonic() - start)
        finally:
            connection.close()

    def draw(
        self, body: Any, content_type: str = JSON, accept: str = "application/json;png"
    ) -> Reply:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", "/invocations", sent, content_type=content_type, accept=accept)

    def ping(self) -> int:
        return self.ask("GET", "/ping").status

    def metric(self, name: str) -> float:
        page = self.ask("GET", "/metrics").body.decode()
        found = re.search(rf"^dreambooth_{re.escape(name)} (\S+)$", page, re.M)
        return float(found[1]) if found else 0.0

    def wait_until(
        self, holds: Callable[[], bool], what: str, check_interval_s: float = 0.02
    ) -> None:
        end = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}\n{self.log}"
            assert self.process.poll() is None, self.log
            time.sleep(check_interval_s)

    def raw(self, *pieces: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        for piece in pieces:
            connection.sendall(piece)
        return connection


@contextlib.contextmanager
def serve(*options: str, model: str = "tiny", ready: bool = True) -> Iterator[Server]:
    command = [sys.executable, "-m", "dreambooth", "serve", "--model", model]
    with started([*command, "--port", "0", "--host", "127.0.0.1", *options]) as server:
        if ready:
            server.early = [server.ask("GET", "/ping"), server.draw(SHORT)]
            server.wait_until(lambda: server.ping() == 200, "ready", check_interval_s=0.25)
        yield server


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[Server]:
    """Yield a server that listens; its engine may still be loading."""
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    server = Server(process)
    reading = threading.Thread(target=server.read_log)
    reading.start()
    try:
        server.wait_until(lambda: "listening on" in server.log, "a port")
        server.port = int(re.findall(r"listening on http://127.0.0.1:(\d+)", server.log)[0])
        yield server
    finally:
        process.kill()
        process.wait()
        reading.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Yield one server for the whole file, since loading is slow; the last test ends it."""
    with serve("--request_timeout_s", "3600") as served:
        yield served
        if served.process.poll() is not None:
            return
        assert served.metric("requests_in_flight") == 0
        assert served.metric("pictures_in_flight") == 0
        assert "Traceback" not in served.log


def error_of(reply: Reply) -> dict[str, Any]:
    found = reply.json
    assert isinstance(found, dict)
    assert found["code"] == reply.status
    assert set(found) - {"retry_after_s"} == {"code", "type", "message", "error", "request_id"}
    return found


def picture(data: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def test_while_loading_the_port_is_open_and_says_503(server: Server) -> None:
    for reply in server.early:
        assert reply.status == 503
        assert error_of(reply)["retry_after_s"] > 0
        assert reply.seconds < 5


def test_ready_is_200_and_empty(server: Server) -> None:
    reply = server.ask("GET", "/ping")
    assert (reply.status, reply.body) == (200, b"")


def test_text_requests_get_one_picture_in_the_published_shapes(server: Server) -> None:
    nested = server.draw(b"a cat", TEXT, JSON)  # 50 steps, since a text request cannot set a number
    pixels = np.array(nested.json["generated_image"])
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 <= pixels.min() <= pixels.max() <= 255
    assert nested.json["prompt"] == "a cat"
    assert nested.headers["content-type"] == JSON
    jpeg = server.draw(b'"a cat"', TEXT, "application/json;jpeg").json
    assert picture(jpeg["generated_image"]).format == "JPEG"
    assert jpeg["prompt"] == '"a cat"'


def test_json_requests_get_a_list_in_the_published_shapes(server: Server) -> None:
    asked = SHORT | {"prompt": ["a cat", "a dog"], "width": 32, "height": 24}
    nested = server.draw(asked, accept=JSON)
    assert np.array(nested.json["generated_images"]).shape == (2, 24, 32, 3)
    assert nested.json["prompt"] == ["a cat", "a dog"]
    assert nested.attributes["seed"] == "7"
    jpeg = server.draw(asked, accept="application/json;jpeg").json
    assert [picture(one).size for one in jpeg["generated_images"]] == [(32, 24)] * 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_one_picture_comes_as_a_file(server: Server, kind: str) -> None:
    reply = server.draw(SHORT, accept=f"image/{kind}")
    assert reply.headers["content-type"] == f"image/{kind}"
    assert picture(reply.body).format == kind.upper()


def test_the_hugging_face_form_is_taken(server: Server) -> None:
    asked = {"inputs": "a cat", "parameters": {"num_inference_steps": 2}}
    assert picture(server.draw(asked, accept="image/png").body).format == "PNG"


def test_the_returned_seed_gives_the_same_picture_again(server: Server) -> None:
    first = server.draw({"prompt": "a cat", "num_inference_steps": 3}, accept="image/png")
    again = {"prompt": "a cat", "num_inference_steps": 3, "seed": int(first.attributes["seed"])}
    pixels = [
        np.asarray(picture(body), np.int16)
        for body in (first.body, server.draw(again, accept="image/png").body)
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2


@pytest.mark.parametrize(
    ("body", "content_type", "accept", "status"),
    [
        (b'{"prompt": NaN}', JSON, JSON, 400),
        (b"[" * 100_000, JSON, JSON, 400),
        (b'{"prompt": "x", "widht": 8}', JSON, JSON, 400),
        (b'{"prompt": "x", "width": 12}', JSON, JSON, 400),
        (b"\xff", TEXT, JSON, 400),
        (b"a cat", "text/plain", JSON, 415),
        (b"a cat", TEXT, "text/html", 406),
        (b"x" * 2_000_000, TEXT, JSON, 413),
    ],
)
def test_wrong_requests_are_refused_at_once(
    server: Server, body: bytes, content_type: str, accept: str, status: int
) -> None:
    reply = server.draw(body, content_type, accept)
    assert error_of(reply)["code"] == status
    assert reply.seconds < 2


def test_a_chunked_body_beyond_the_cap_is_cut_off(server: Server) -> None:
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.raw(head) as connection, contextlib.suppress(ConnectionError):
        for _ in range(40):
            connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_compressed_body_is_refused(server: Server) -> None:
    reply = server.ask(
        "POST", "/invocations", b"\x1f\x8b", content_type=JSON, content_encoding="gzip"
    )
    assert error_of(reply)["code"] == 415


def test_a_client_that_expects_100_continue_gets_it(server: Server) -> None:
    body = json.dumps(SHORT).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Content-Length: %d\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    with server.raw((head % len(body)).encode()) as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 200"
    with server.raw((head % 10**9).encode()) as connection:
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_head_request_has_no_body(server: Server) -> None:
    reply = server.ask("HEAD", "/openapi.json")
    assert (reply.status, reply.body) == (200, b"")
    assert int(reply.headers["content-length"]) == len(server.ask("GET", "/openapi.json").body)
    assert server.ask("HEAD", "/ping").status == 200
    assert server.ask("HEAD", "/invocations").status == 405


def test_half_open_connections_are_closed_in_10_s_and_pings_answered_meanwhile(
    server: Server,
) -> None:
    kinds = [
        b"",
        b"POST /invocations HTTP/1.1\r\n",
        b"POST /invocations HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
    ]
    held = [(server.raw(kinds[i % 3]), time.monotonic()) for i in range(150)]
    try:
        pings = []
        while time.monotonic() < held[0][1] + 4:
            pings.append(server.ask("GET", "/ping").seconds)
        assert sorted(pings)[len(pings) // 2] < 0.1
        assert server.metric("connections_open") > 100
        for connection, opened in held:
            with contextlib.suppress(ConnectionError):
                while connection.recv(65_536):
                    pass
            assert time.monotonic() - opened < 12
    finally:
        for connection, _ in held:
            connection.close()
    assert server.metric('connections_refused_total{reason="slow body"}') == 50


def test_a_client_that_leaves_stops_its_work(server: Server) -> None:
    body = json.dumps(LONG | {"num_images_per_prompt": 2}).encode()
    head = f"POST /invocations HTTP/1.1\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n"
    head += "Accept: application/json;jpeg\r\n\r\n"
    with server.raw(head.encode() + body):
        server.wait_until(lambda: server.metric("running_rows") > 0, "work")
    server.wait_until(lambda: server.metric("running_rows") == 0, "no work")
    assert server.metric("pictures_in_flight") == 0
    steps = server.metric("steps_total")
    time.sleep(0.6)
    assert server.metric("steps_total") == steps
    assert server.metric('losses_total{reason="cancelled"}') >= 1
    assert " 499 " in server.log


def test_what_a_killed_server_left_is_swept_and_a_closed_terminal_while_loading_ends_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serve(ready=False) as server:
        server.wait_until(lambda: [*tmp_path.glob("dreambooth-job-*")], "a temporary folder")
        server.process.kill()
        server.process.wait()
        (killed,) = tmp_path.iterdir()
    with serve(ready=False) as server:
        server.wait_until(lambda: not killed.exists(), "an empty temporary folder")
        time.sleep(0.5)
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(20) == 0
    assert not [*tmp_path.iterdir()]


def test_a_model_that_cannot_be_loaded_ends_the_server_with_one_sentence(tmp_path: Path) -> None:
    for model in (str(tmp_path / "none"), str(tmp_path)):
        command = [sys.executable, "-m", "dreambooth", "serve", "--model", model, "--port", "0"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "the model cannot be served: " in done.stderr
        assert model in done.stderr


# `dreambooth serve` with the stand-in engine of tests/serving/supervision, which needs no torch.
STAND_IN_SERVER = """
import sys
from dreambooth.serving.supervision.supervisor import Supervisor
Supervisor.__init__.__kwdefaults__["command"] = (sys.executable, *sys.argv[1:4])
from dreambooth.__main__ import main
sys.exit(main(["serve", "--model", "tiny", "--host", "127.0.0.1", *sys.argv[4:]]))
"""


def stand_in_server(mode: str, marker: Path, *options: str) -> list[str]:
    """Return the command of a server whose engine misbehaves unless `marker` exists."""
    program = ROOT / "tests" / "serving" / "supervision" / "stand_in.py"
    return [sys.executable, "-c", STAND_IN_SERVER, str(program), mode, str(marker), *options]


def test_a_model_that_is_gone_later_ends_the_server_at_the_engines_next_start(
    tmp_path: Path,
) -> None:
    command = stand_in_server("cannot_load_again", tmp_path / "marker", "--port", "0")
    with started(command) as server:
        server.wait_until(lambda: server.ping() == 200, "ready", check_interval_s=0.25)
        os.kill(int(server.metric("engine_pid")), signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 1
    assert "the model cannot be served: the model is gone." in server.log


def test_a_log_that_nobody_reads_stops_no_request(tmp_path: Path) -> None:
    """A container's log driver may hang; a pipe then takes only 64 KiB."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "marker").touch()
    command = stand_in_server("nonsense", tmp_path / "marker", "--port", str(port))
    reading, writing = os.pipe()
    process = subprocess.Popen(command, cwd=ROOT, stdout=writing, stderr=writing)
    os.close(writing)
    server = Server(process)
    server.port = port
    try:
        server.wait_until(lambda: answers(server), "ready", check_interval_s=0.25)
        for _ in range(1500):
            assert server.ask("GET", "/" + 90 * "x").status == 404
        assert server.draw(SHORT).status == 200
        reply = server.ask("GET", "/ping")
        assert reply.status == 200
        assert reply.seconds < 2
        for number in range(10_000):  # until the queue in front of the pipe is full too
            server.ask("GET", "/" + 90 * "x")
            if number % 100 == 0 and server.metric("log_lines_dropped_total"):
                break
        assert server.metric("log_lines_dropped_total") > 0
        assert server.draw(SHORT).status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def answers(server: Server) -> bool:
    try:
        return server.ping() == 200
    except OSError:
        return False


def test_a_port_that_is_taken_is_reported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "dreambooth",
            "serve",
            "--host",
            "127.0.0.1",
            "--port",
            port,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Port {port} of 127.0.0.1 cannot be listened on")


def test_a_killed_engine_is_reported_at_once_and_replaced(tmp_path: Path) -> None:
    command = stand_in_server("hangs_in_a_step", tmp_path / "marker", "--port", "0")
    with started(command) as server:
        server.wait_until(lambda: server.ping() == 200, "ready", check_interval_s=0.25)
        with ThreadPoolExecutor(3) as clients:
            asked = [clients.submit(server.draw, SHORT) for _ in range(3)]
            server.wait_until(lambda: server.metric("pictures_in_flight") == 3, "work")
            pid, killed = int(server.metric("engine_pid")), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for one in asked:
                error = error_of(one.result())
                assert error["code"] == 503
                assert error["retry_after_s"] > 0
            assert time.monotonic() - killed < 5
        server.wait_until(lambda: server.ping() == 200, "a new engine", check_interval_s=0.25)
        assert server.metric("engine_pid") not in (0, pid)
        assert server.metric("engine_restarts_total") == 1
        assert server.draw(SHORT).status == 200
        assert server.metric("requests_in_flight") == 0


def test_after_sigterm_what_was_accepted_is_answered_and_nothing_new_is_taken(
    server: Server,
) -> None:
    engine = int(server.metric("engine_pid"))
    keeping = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    keeping.request("GET", "/ping")
    keeping.getresponse().read()
    with ThreadPoolExecutor(4) as clients:
        some = SHORT | {"num_inference_steps": 20}
        asked = [clients.submit(server.draw, some) for _ in range(4)]
        server.wait_until(lambda: server.metric("pictures_in_flight") == 4, "work")
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: "shutting down" in server.log, "the signal")
        with contextlib.suppress(ConnectionError):  # all requests may have been done already
            keeping.request("GET", "/ping")
            assert keeping.getresponse().status == 503
        keeping.close()
        assert [one.result().status for one in asked] == [200] * 4
    assert server.process.wait(28) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
    assert "Traceback" not in server.log
