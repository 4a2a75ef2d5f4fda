"""`affect-mqtt` against a real mosquitto on loopback: delivery, status, a broker that dies and comes back."""

import gc
import getpass
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from affect_demos import events as events_command
from affect_demos._publisher import BrokerSettings, Publisher
from affect_demos.mqtt import main

DEADLINE_S = 20.0


def mosquitto() -> str:
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert found, "mosquitto is missing; Debian: apt install mosquitto"
    return found


class Broker:
    """A mosquitto of this test's own. `stop` kills it; `start` begins again on the same port."""

    def __init__(self, folder: Path, extra: str = "allow_anonymous true\n") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"listener {self.port} 127.0.0.1\n{extra}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [mosquitto(), "-c", str(self._config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until(lambda: self._listens() or self._gone())
        assert not self._gone(), self._process.stderr and self._process.stderr.read()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _gone(self) -> bool:
        return self._process is not None and self._process.poll() is not None


def until(condition: Callable[[], object]) -> None:
    """Waits for a condition, and fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        pause.wait(0.01)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.stop()


class Listener:
    """What a subscriber hears, in order: (topic, text, retained)."""

    def __init__(self, port: int, tune: Callable[[Client], None] = lambda client: None) -> None:
        self.heard: list[tuple[str, str, bool]] = []
        self._client = Client(CallbackAPIVersion.VERSION2)
        tune(self._client)
        self._client.reconnect_delay_set(1, 1)
        self._subscribed = threading.Event()
        self._client.on_connect = lambda client, *rest: client.subscribe("affect/#", qos=1)
        self._client.on_subscribe = lambda *rest: self._subscribed.set()
        self._client.on_message = self._hear
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(DEADLINE_S)

    def _hear(self, client: Client, data: Any, message: MQTTMessage) -> None:
        self.heard.append((message.topic, message.payload.decode(), message.retain))

    def texts(self, topic: str) -> list[str]:
        return [text for name, text, _ in list(self.heard) if name == topic]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts("affect/cabin/events")]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def listener(broker: Broker) -> Iterator[Listener]:
    listener = Listener(broker.port)
    yield listener
    listener.close()


def settings(port: int, **changes: Any) -> BrokerSettings:
    fields: dict[str, Any] = {"host": "127.0.0.1", "port": port, "topic": "affect/cabin", "most_retry_s": 1}
    return BrokerSettings(**(fields | changes))


def test_events_arrive_in_order_between_online_and_offline(broker: Broker, listener: Listener) -> None:
    publisher = Publisher(settings(broker.port))
    for i in range(100):
        publisher.publish({"event": "face", "track_id": i})
    assert publisher.close()
    until(lambda: listener.texts("affect/cabin/status")[-1:] == ["offline"])
    assert listener.texts("affect/cabin/status") == ["online", "offline"]
    events = listener.events()
    assert [(e["sequence"], e["track_id"]) for e in events] == [(i, i) for i in range(100)]
    assert all(abs(e["unix_s"] - time.time()) < 60 for e in events)
    assert publisher.dropped == 0


def test_the_status_is_kept_for_who_comes_later(broker: Broker) -> None:
    publisher = Publisher(settings(broker.port))
    publisher.publish({"event": "face"})
    until(lambda: not publisher._queue and not publisher._unacknowledged)
    late = Listener(broker.port)
    until(lambda: late.heard)
    assert late.heard[0] == ("affect/cabin/status", "online", True)
    publisher.close()
    late.close()


def test_a_client_that_dies_is_said_to_be_offline(broker: Broker, listener: Listener) -> None:
    publisher = Publisher(settings(broker.port))
    until(lambda: listener.texts("affect/cabin/status") == ["online"])
    connection = publisher._client.socket()
    assert isinstance(connection, socket.socket)
    # As when the device loses power: no goodbye. The client comes back by itself and says so.
    connection.shutdown(socket.SHUT_RDWR)
    until(lambda: listener.texts("affect/cabin/status")[:3] == ["online", "offline", "online"])
    publisher.close()


def test_a_broker_that_dies_and_comes_back_gets_everything(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(settings(broker.port))
    publisher.publish({"event": "face", "n": 0})
    until(lambda: publisher._connected and not publisher._queue and not publisher._unacknowledged)
    broker.stop()
    for i in range(1, 51):
        publisher.publish({"event": "face", "n": i})
    until(lambda: not publisher._connected)
    broker.start()
    listener = Listener(broker.port)
    until(lambda: {e["n"] for e in listener.events()} >= set(range(1, 51)))
    assert publisher.close()
    until(lambda: listener.texts("affect/cabin/status")[-1:] == ["offline"])
    listener.close()
    # At least once: what was on its way when the broker died may come twice, under its own number.
    assert all(e["n"] == e["sequence"] for e in listener.events())
    assert publisher.dropped == 0
    said = [r.getMessage() for r in caplog.records if r.name == "affect_edge" and r.levelno >= logging.WARNING]
    assert any("trying again" in line for line in said) and said[-1].endswith("connected again")


def test_a_full_queue_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    broker = Broker(tmp_path)  # not started: the broker is away from the beginning
    publisher = Publisher(settings(broker.port, queue=10))
    for i in range(25):
        publisher.publish({"event": "face", "n": i})
    assert publisher.dropped == 15
    broker.start()
    listener = Listener(broker.port)
    until(lambda: len(listener.events()) >= 10)
    assert publisher.close()
    assert [e["sequence"] for e in listener.events()] == list(range(15, 25))
    listener.close()
    broker.stop()


def test_closing_without_a_broker_ends_and_says_so(tmp_path: Path) -> None:
    publisher = Publisher(settings(Broker(tmp_path).port))
    publisher.publish({"event": "face"})
    assert publisher.close(timeout_s=0.1) is False


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Broker]:
    """Wants TLS, a name and a password."""
    for command in (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out ca.pem -days 2"
        " -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1".split(),
        ["mosquitto_passwd", "-b", "-c", "passwords", "cabin", "correct horse"],
    ):
        assert shutil.which(command[0]), f"{command[0]} is missing; Debian: apt install openssl mosquitto"
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    # Started by root it would become another user, who may not read the files here.
    lines = [f"user {getpass.getuser()}", "allow_anonymous false", f"password_file {tmp_path}/passwords"]
    lines += [f"certfile {tmp_path}/ca.pem", f"keyfile {tmp_path}/key.pem", ""]
    broker = Broker(tmp_path, "\n".join(lines))
    broker.start()
    yield broker
    broker.stop()


def test_tls_and_password(guarded: Broker, tmp_path: Path) -> None:
    login: dict[str, Any] = {"tls": True, "ca": tmp_path / "ca.pem", "user": "cabin", "password": "correct horse"}

    def tune(client: Client) -> None:
        client.tls_set(str(tmp_path / "ca.pem"))
        client.username_pw_set("cabin", "correct horse")

    listener = Listener(guarded.port, tune)
    publisher = Publisher(settings(guarded.port, **login))
    publisher.publish({"event": "face"})
    assert publisher.close()
    until(lambda: len(listener.events()) == 1)
    listener.close()
    assert "correct horse" not in repr(settings(1, **login))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"password": "wrong"}, "refused: Not authorized"), ({"ca": None}, "certificate is not trusted")],
)
# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_password_or_an_unknown_certificate_is_said_once(
    change: dict[str, Any], says: str, guarded: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    login: dict[str, Any] = {"tls": True, "ca": tmp_path / "ca.pem", "user": "cabin", "password": "correct horse"}
    publisher = Publisher(settings(guarded.port, **(login | change)))
    publisher.publish({"event": "face"})
    until(lambda: any(says in record.getMessage() for record in caplog.records))
    assert publisher.close(timeout_s=0.0) is False
    del publisher
    gc.collect()
    assert not any("wrong" in record.getMessage() for record in caplog.records)


def test_the_command_publishes_the_events_of_a_source(
    broker: Broker, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def events(source: str, bundle: str | None) -> Iterator[dict[str, object]]:
        assert (source, bundle) == ("drive.mp4", None)
        yield {"event": "face", "timestamp_s": 0.0, "track_id": 0, "held": False}

    monkeypatch.setattr(events_command, "affect_events", events)
    assert main(["drive.mp4", "--broker", f"127.0.0.1:{broker.port}", "--topic", "affect/cabin"]) == 0
    until(lambda: listener.texts("affect/cabin/status") == ["online", "offline"])
    [event] = listener.events()
    assert (event["event"], event["sequence"]) == ("face", 0)


def test_a_source_that_fails_is_exit_1_and_offline(
    broker: Broker, listener: Listener, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "missing.mp4"), "--broker", f"127.0.0.1:{broker.port}"]) == 1
    assert "missing.mp4: no such file" in capsys.readouterr().err
    assert listener.texts("affect/cabin/status")[-1:] in ([], ["online"], ["offline"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--broker", "host:port"], "HOST or HOST:PORT"),
        (["--broker", "host:70000"], "HOST or HOST:PORT"),
        (["--broker", ":1883"], "HOST or HOST:PORT"),
        (["--broker", "h", "--topic", "affect/#"], "without the wildcards"),
        (["--broker", "h", "--topic", "/"], "without the wildcards"),
        (["--broker", "h", "--queue", "0"], "at least 1"),
        (["--broker", "h", "--ca", "x"], "go with --tls"),
        (["--broker", "h", "--tls", "--key", "x"], "goes with --cert"),
        (["--broker", "h", "--password-file", "missing"], "--password-file missing"),
        (["--broker", "h", "--password", "secret"], "unrecognized arguments"),  # never on the command line
    ],
)
def test_wrong_usage_is_exit_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["drive.mp4", *arguments])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("broker_text", "more", "expected"),
    [
        ("host", [], ("host", 1883)),
        ("host", ["--tls"], ("host", 8883)),
        ("host:99", ["--tls"], ("host", 99)),
        ("[::1]:99", [], ("::1", 99)),
        ("[::1]", [], ("::1", 1883)),
    ],
)
def test_addresses(broker_text: str, more: list[str], expected: tuple[str, int]) -> None:
    from affect_demos.mqtt import _parser, _settings

    parser = _parser()
    made = _settings(parser, parser.parse_args(["x", "--broker", broker_text, *more]))
    assert (made.host, made.port) == expected


def test_the_password_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from affect_demos.mqtt import _parser, _settings

    def made(*arguments: str) -> BrokerSettings:
        parser = _parser()
        return _settings(parser, parser.parse_args(["x", "--broker", "10.0.0.5", "--user", "cabin", *arguments]))

    assert made().password is None
    monkeypatch.setenv("AFFECT_MQTT_PASSWORD", "from the environment")
    assert made().password == "from the environment"
    assert "unencrypted" in capsys.readouterr().err
    (tmp_path / "password").write_text("from a file\nsecond line\n")
    assert made("--tls", "--password-file", str(tmp_path / "password")).password == "from a file"
    assert capsys.readouterr().err == ""


def test_without_paho_it_says_the_pip_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "paho" else find(name))
    assert main(["0", "--broker", "localhost"]) == 1
    assert 'pip install "affect-edge[demo]"' in capsys.readouterr().err
