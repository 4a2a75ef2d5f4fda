"""`affect-mqtt SOURCE --broker HOST:PORT --topic affect/cabin`: the events of `affect-events`, over MQTT.

Exit codes: 0 done, 1 refused or failed, 2 usage.
"""

import argparse
import importlib.util
import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from affect_demos._publisher import BrokerSettings

__all__ = ["main"]

_PASSWORD = "AFFECT_MQTT_PASSWORD"
_PORT, _TLS_PORT = 1883, 8883


def main(argv: list[str] | None = None) -> int:
    """Publishes affect events to TOPIC/events (QoS 1), and "online" or "offline" at TOPIC/status (retained)."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    settings = _settings(parser, arguments)

    from affect_edge import AffectError, MissingDependencyError

    logging.basicConfig(format="affect-mqtt: %(message)s", level=logging.WARNING)
    try:
        if importlib.util.find_spec("paho") is None:
            raise MissingDependencyError('affect-mqtt needs paho-mqtt: pip install "affect-edge[demo]"')
        return _run(arguments, settings)
    except (AffectError, OSError) as error:
        print(f"affect-mqtt: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace, settings: "BrokerSettings") -> int:
    from affect_demos._publisher import Publisher
    from affect_demos.events import affect_events

    publisher = Publisher(settings)
    complete = False
    try:
        for event in affect_events(arguments.source, arguments.bundle):
            publisher.publish(event)
    except KeyboardInterrupt:
        pass  # the way to stop a camera
    finally:
        complete = publisher.close()
        if publisher.dropped or not complete:
            left = "" if complete else "; the last ones were not acknowledged"
            print(f"affect-mqtt: {publisher.dropped} events dropped while the broker was away{left}", file=sys.stderr)
    return 0 if complete else 1


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --password SECRET would pass for --password-file, and be printed as a file that is missing.
    parser = argparse.ArgumentParser(prog="affect-mqtt", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="a video file, a camera's index such as 0, or a URL")
    parser.add_argument("--bundle", metavar="DIR", help="default: the shipped student")
    parser.add_argument("--broker", metavar="HOST[:PORT]", required=True, help="port: 1883, or 8883 with --tls")
    parser.add_argument("--topic", default="affect/cabin", help="default: %(default)s")
    parser.add_argument("--queue", type=int, metavar="N", default=1000, help="events kept while the broker is away")
    parser.add_argument(
        "--user", metavar="NAME", help=f"its password: {_PASSWORD} in the environment, or --password-file"
    )
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="its first line is the password")
    parser.add_argument("--tls", action="store_true", help="encrypt, and check the broker's certificate and name")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="certificates to trust instead of the system's")
    parser.add_argument("--cert", type=Path, metavar="FILE", help="this client's certificate")
    parser.add_argument("--key", type=Path, metavar="FILE", help="its key")
    return parser


def _settings(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> "BrokerSettings":
    """Checked; wrong usage exits here."""
    from affect_demos._publisher import BrokerSettings

    host, port = _address(parser, arguments.broker, _TLS_PORT if arguments.tls else _PORT)
    topic: str = arguments.topic.strip("/")
    if not topic or "#" in topic or "+" in topic:
        parser.error(f"--topic {arguments.topic!r}: a topic to publish to, without the wildcards + and #")
    if arguments.queue < 1:
        parser.error(f"--queue {arguments.queue}: at least 1")
    if not arguments.tls and (arguments.ca or arguments.cert or arguments.key):
        parser.error("--ca, --cert and --key go with --tls")
    if arguments.key and not arguments.cert:
        parser.error("--key goes with --cert")
    password = _password(parser, arguments.password_file)
    if password is not None and arguments.user is None:
        parser.error("a password goes with --user NAME")
    if password is not None and not arguments.tls and not _loopback(host):
        print(f"affect-mqtt: the password goes to {host} unencrypted; use --tls", file=sys.stderr)
    return BrokerSettings(
        host,
        port,
        topic,
        user=arguments.user,
        password=password,
        tls=arguments.tls,
        ca=arguments.ca,
        cert=arguments.cert,
        key=arguments.key,
        queue=arguments.queue,
    )


def _address(parser: argparse.ArgumentParser, text: str, default: int) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPv6] or [IPv6]:PORT."""
    host, bracket, rest = text[1:].partition("]") if text.startswith("[") else (text, "", "")
    if bracket:
        port = rest.removeprefix(":")
    else:
        host, _, port = text.partition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        parser.error(f"--broker {text!r}: HOST or HOST:PORT, such as localhost:1883")
    return host, int(port) if port else default


def _password(parser: argparse.ArgumentParser, path: Path | None) -> str | None:
    """From a file or the environment; never from the command line, which every user of the machine can read."""
    if path is None:
        return os.environ.get(_PASSWORD)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--password-file {path}: {error}")
    if not lines or not lines[0]:
        parser.error(f"--password-file {path}: its first line is empty")
    return lines[0]


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
