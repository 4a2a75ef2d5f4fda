"""Events to an MQTT broker that may be away: queued, bounded, told once it is back."""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paho.mqtt.client import Client
    from paho.mqtt.reasoncodes import ReasonCode

__all__ = ["BrokerSettings", "Publisher"]

_log = logging.getLogger("affect_edge")

_IN_FLIGHT = 20
"""Events handed to paho and not yet acknowledged; the others wait here, where the oldest can be dropped."""


@dataclass(frozen=True)
class BrokerSettings:
    """Where to publish, and how.

    Attributes:
        host: of the broker.
        port: of the broker.
        topic: events go to TOPIC/events, "online" or "offline" is kept at TOPIC/status.
        user: name for the broker; None for none.
        password: for that name. Never printed.
        tls: whether to encrypt, and to check the broker's certificate and name.
        ca: file of certificates to trust instead of the system's.
        cert: file with this client's certificate, for brokers that ask for one.
        key: file with its key.
        queue: most events that wait while the broker is away; the oldest are dropped.
        first_retry_s: wait before connecting again; doubled up to `most_retry_s`.
        most_retry_s: longest such wait.
        keepalive_s: after one and a half times as long without a word the broker calls this client offline.
    """

    host: str
    port: int
    topic: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    queue: int = 1000
    first_retry_s: int = 1
    most_retry_s: int = 30
    keepalive_s: int = 15


class Publisher:
    """Sends events in the order they were given, at least once each (QoS 1).

    Every event carries a `sequence`, counted from 0 at start: a repeated number is the same event once more, a missing
    one was dropped. Never blocks the caller on the network.

    Args:
        settings: of the broker. It need not be there yet.
        client_id: as the broker knows this client; empty lets it choose.

    Raises:
        OSError: a certificate file that cannot be read.
    """

    def __init__(self, settings: BrokerSettings, client_id: str = "") -> None:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        self._settings = settings
        self._events, self._status = f"{settings.topic}/events", f"{settings.topic}/status"
        self._queue: deque[str] = deque()
        # Never held while paho is called: paho calls back with its own locks held.
        self._changed = threading.Condition()
        self._unacknowledged = 0
        self._closing = False
        self._sequence = 0
        self._connected = False
        self._said: str | None = None
        self.dropped = 0
        """Events that were dropped because the broker was away for too long."""
        client = Client(CallbackAPIVersion.VERSION2, client_id=client_id)
        client.will_set(self._status, "offline", qos=1, retain=True)
        client.max_inflight_messages_set(_IN_FLIGHT)
        client.reconnect_delay_set(settings.first_retry_s, settings.most_retry_s)
        if settings.user is not None:
            client.username_pw_set(settings.user, settings.password)
        if settings.tls:
            ca, cert, key = (None if path is None else str(path) for path in (settings.ca, settings.cert, settings.key))
            client.tls_set(ca, cert, key)
        client.on_connect, client.on_disconnect, client.on_publish = self._up, self._down, self._acknowledged
        client.on_connect_fail = self._unreachable
        self._client = client
        client.connect_async(settings.host, settings.port, keepalive=settings.keepalive_s)
        client.loop_start()
        self._thread = threading.Thread(target=self._hand_over, name="affect-mqtt", daemon=True)
        self._thread.start()

    def publish(self, event: Mapping[str, Any]) -> None:
        """Queues an event, with its number and the time of day in `unix_s`."""
        with self._changed:
            text = json.dumps({**event, "sequence": self._sequence, "unix_s": round(time.time(), 3)})
            self._sequence += 1
            self._queue.append(text)
            if len(self._queue) > self._settings.queue:
                self._queue.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    _log.warning("%s: the queue is full; the oldest events are dropped", self._where)
            self._changed.notify_all()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Waits until everything has arrived, says "offline" and goes.

        Args:
            timeout_s: longest wait for a broker that does not answer.

        Returns:
            Whether everything has arrived.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not (self._queue or self._unacknowledged), timeout_s)
            self._closing = True
            connected = self._connected
            self._changed.notify_all()
        self._thread.join()
        if connected:
            # A clean goodbye makes the broker forget the last will, so it is said here.
            with self._changed:
                self._unacknowledged += 1
            farewell = self._client.publish(self._status, "offline", qos=1, retain=True)
            try:
                farewell.wait_for_publish(timeout_s)
            except (RuntimeError, ValueError):
                done = False
        self._client.disconnect()
        self._client.loop_stop()
        return done

    @property
    def _where(self) -> str:
        return f"{self._settings.host}:{self._settings.port}"

    def _hand_over(self) -> None:
        """The thread that moves events from the queue to paho, as many as may be in flight."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._ready())
                if self._closing:
                    return
                text = self._queue.popleft()
                self._unacknowledged += 1
            # paho sends it again by itself when the connection breaks before the broker has acknowledged it.
            self._client.publish(self._events, text, qos=1)

    def _ready(self) -> bool:
        return self._connected and bool(self._queue) and self._unacknowledged < _IN_FLIGHT

    def _up(self, client: "Client", data: Any, flags: Any, reason: "ReasonCode", properties: Any) -> None:
        if reason.is_failure:
            self._say(f"refused: {reason}")
            return
        self._say(None)
        with self._changed:
            self._unacknowledged += 1
        client.publish(self._status, "online", qos=1, retain=True)
        with self._changed:
            self._connected = True
            self._changed.notify_all()

    def _down(self, client: "Client", data: Any, flags: Any, reason: "ReasonCode", properties: Any) -> None:
        with self._changed:
            was, self._connected = self._connected, False
        if was and reason.is_failure:
            self._say(f"connection lost: {reason}")

    def _unreachable(self, client: "Client", data: Any) -> None:
        # paho does not say which.
        self._say("cannot be reached" + (", or its certificate is not trusted" if self._settings.tls else ""))

    def _acknowledged(self, client: "Client", data: Any, mid: int, reason: "ReasonCode", properties: Any) -> None:
        with self._changed:
            self._unacknowledged -= 1
            self._changed.notify_all()

    def _say(self, trouble: str | None) -> None:
        """Logs what changed, once: a broker that is away for a day is one line, not thousands."""
        if trouble is not None and trouble != self._said:
            _log.warning("%s: %s; trying again", self._where, trouble)
        elif trouble is None and self._said is not None:
            _log.warning("%s: connected again", self._where)
        self._said = trouble
