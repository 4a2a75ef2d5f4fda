"""The live page's server: who is let in, what is sent, and that nobody waits for a slow page."""

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from affect_demos._hub import Hub
from affect_demos._web import WebSettings, serve

TOKEN = "a-token-of-some-length"
Visit = Callable[[aiohttp.ClientSession, str, Hub], Awaitable[None]]


def visit(what: Visit, host: str = "127.0.0.1", token: str | None = None, **session: Any) -> None:
    """Runs a visitor against a server of its own; 127.0.0.1 is how it gets there, whatever the server listens on."""

    async def run() -> None:
        hub = Hub()
        hub.tell({"about": {"model": "student"}, "status": {"state": "waiting"}})
        settings = WebSettings.of(host, 0, token)
        async with (
            serve(settings, hub, lambda: {"frames": 7}) as url,
            aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), **session) as client,
        ):
            port = url.split("/")[2].rpartition(":")[2]
            await what(client, f"http://127.0.0.1:{port}", hub)

    asyncio.run(asyncio.wait_for(run(), 20))


PATHS = ["/", "/app.js", "/traces.js", "/style.css", "/icon.svg", "/summary.json"]


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/../dashcam.py", "/index.html"])
def test_every_answer_carries_the_security_headers(path: str) -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        async with client.get(url + path) as answer:
            assert answer.status == (200 if path in PATHS else 404)
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "style-src 'self';" in policy
            assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert answer.headers["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in answer.headers

    visit(look)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        for path in PATHS[:-1]:
            async with client.get(url + path) as answer:
                text = (await answer.text()).replace("http://www.w3.org/2000/svg", "")
                assert "http://" not in text and "https://" not in text and "//cdn" not in text
                assert "<style" not in text and " onclick" not in text and " style=" not in text

    visit(look)


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8347", 200),
        ("127.0.0.1", "localhost:9000", 200),  # another port: a tunnel
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "[::1]:8347", 200),
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "evil.example:8347", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "192.168.1.4:8347", 403),  # only this machine is served, so nobody comes by that address
        ("127.0.0.1", "", 403),
        ("0.0.0.0", "192.168.1.4:8347", 200),  # a number is nobody else's name
        ("0.0.0.0", "[fe80::1]:8347", 200),
        ("0.0.0.0", "evil.example:8347", 403),
    ],
)
def test_names_that_are_not_ours_are_refused(host: str, name: str, status: int) -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        async with client.get(f"{url}/?token={TOKEN}", headers={"Host": name}) as answer:
            assert answer.status == status

    visit(look, host, None if host == "127.0.0.1" else TOKEN)


def test_without_the_token_there_is_nothing() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        for path in [*PATHS, "/live", "/nothing"]:
            for query in ("", "?token=", "?token=wrong", f"?token={TOKEN}x", "?token=%ff%c3%28", "?token=é"):
                if path == "/" or not query:
                    async with client.get(url + path + query, headers={"Origin": url}) as answer:
                        assert answer.status == 401, (path, query)
                        assert "Set-Cookie" not in answer.headers
                        assert "token" in await answer.text()
        for cookie in ("", "wrong", TOKEN):
            name = f"affect_edge_{url.rpartition(':')[2]}"
            async with client.get(f"{url}/summary.json", headers={"Cookie": f"{name}={cookie}"}) as answer:
                assert answer.status == 401

    visit(look, token=TOKEN)


def test_the_right_token_becomes_a_strict_cookie() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        async with client.get(f"{url}/summary.json?token={TOKEN}") as answer:
            assert answer.status == 401  # only the page takes it
        async with client.get(f"{url}/?token={TOKEN}") as answer:
            assert answer.status == 200
            cookie = answer.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and "Path=/" in cookie
            assert TOKEN not in cookie
        for path in PATHS:
            async with client.get(url + path) as answer:
                assert answer.status == 200
        async with client.ws_connect(f"{url}/live", headers={"Origin": url}) as stream:
            assert (await stream.receive_json())["about"] == {"model": "student"}

    visit(look, token=TOKEN)


@pytest.mark.parametrize(
    ("host", "token", "needed", "made"),
    [
        ("127.0.0.1", None, False, False),
        ("localhost", None, False, False),
        ("::1", None, False, False),
        ("127.0.0.1", "auto", True, True),
        ("127.0.0.1", TOKEN, True, False),
        ("0.0.0.0", None, True, True),
        ("::", None, True, True),
        ("192.168.1.4", None, True, True),
        ("cabin.local", None, True, True),
        ("0.0.0.0", TOKEN, True, False),
    ],
)
def test_a_wider_host_always_has_a_token(host: str, token: str | None, needed: bool, made: bool) -> None:
    settings = WebSettings.of(host, 8347, token)
    assert (settings.token is not None) is needed and settings.made is made
    if made:
        assert settings.token is not None and len(settings.token) >= 32 and settings.token != "auto"
        assert settings.token != WebSettings.of(host, 8347, token).token
    assert TOKEN not in repr(settings)


@pytest.mark.parametrize(("token", "ends"), [(None, "/"), (TOKEN, "/?token=..."), ("auto", None)])
def test_the_printed_address_shows_a_token_only_if_it_was_made(token: str | None, ends: str | None) -> None:
    async def run() -> None:
        settings = WebSettings.of("127.0.0.1", 0, token)
        async with serve(settings, Hub(), dict) as url:
            assert url.startswith("http://127.0.0.1:")
            assert url.endswith(f"/?token={settings.token}" if ends is None else ends)

    asyncio.run(run())


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "https://evil.example:8347", "file://", "same+1"]
)
def test_only_our_own_page_may_watch(origin: str | None) -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        given = f"{url}1" if origin == "same+1" else origin
        headers = {} if given is None else {"Origin": given}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(f"{url}/live", headers=headers)
        assert refused.value.status == 403

    visit(look)


def test_only_reading_is_served() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        for path in [*PATHS, "/live"]:
            async with client.post(url + path) as answer:
                assert answer.status == 405

    visit(look)


def test_the_summary_is_a_download() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        async with client.get(f"{url}/summary.json") as answer:
            assert answer.headers["Content-Disposition"] == 'attachment; filename="affect-summary.json"'
            assert await answer.json() == {"frames": 7}

    visit(look)


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack(">I", data[:4])
    return json.loads(data[4 : 4 + length]), data[4 + length :]


def test_a_late_page_gets_what_it_missed() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        for i in range(5):
            hub.tell({"now": {"t": i}, "samples": [[i]], "events": [{"event": "face", "n": i}]})
        async with client.ws_connect(f"{url}/live", headers={"Origin": url}) as stream:
            first = await stream.receive_json()
            assert first["samples"] == [[i] for i in range(5)] and first["now"] == {"t": 4}
            assert [event["n"] for event in first["events"]] == list(range(5))
            assert first["about"] == {"model": "student"}
            hub.tell({"samples": [[5]]})
            assert await stream.receive_json() == {"samples": [[5]]}

    visit(look)


def test_a_slow_page_skips_pictures_and_gets_the_newest() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        async with client.ws_connect(f"{url}/live", headers={"Origin": url}) as stream:
            await stream.receive_json()
            for i in range(2):
                hub.show({"n": i}, b"jpeg")
                assert parsed(await stream.receive_bytes()) == ({"n": i}, b"jpeg")
            # Two are on their way and none is said to be drawn: the page gets news, but no pictures ...
            assert not hub.wanted
            for i in range(2, 50):
                hub.show({"n": i}, b"jpeg")
            hub.tell({"now": {"t": 1}})
            assert await stream.receive_json() == {"now": {"t": 1}}
            # ... until it says so, and then the newest.
            await stream.send_str("drawn")
            assert parsed(await stream.receive_bytes()) == ({"n": 49}, b"jpeg")

    visit(look)


def test_a_page_that_sends_nonsense_hurts_nobody() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        headers = {"Origin": url}
        async with (
            client.ws_connect(f"{url}/live", headers=headers) as rude,
            client.ws_connect(f"{url}/live", headers=headers) as stream,
        ):
            await stream.receive_json()
            await rude.receive_json()
            await rude.send_str("x" * 5000)  # more than is taken: the connection is closed
            assert (await rude.receive()).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
            await stream.send_str("nonsense")
            for _ in range(9):
                await stream.send_str("drawn")  # more than were sent: no more credit for it
            hub.tell({"now": 1})
            assert await stream.receive_json() == {"now": 1}
            for i in range(9):
                hub.show({"n": i}, b"")
            hub.tell({"now": 2})
            pictures = 0
            while (await stream.receive()).type is aiohttp.WSMsgType.BINARY:
                pictures += 1
            assert pictures <= 2

    visit(look)


def test_a_ninth_page_is_turned_away() -> None:
    async def look(client: aiohttp.ClientSession, url: str, hub: Hub) -> None:
        streams = [await client.ws_connect(f"{url}/live", headers={"Origin": url}) for _ in range(8)]
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await client.ws_connect(f"{url}/live", headers={"Origin": url})
        assert refused.value.status == 503
        await streams[0].close()
        streams.append(await client.ws_connect(f"{url}/live", headers={"Origin": url}))
        for stream in streams:
            await stream.close()

    visit(look)


def test_pages_are_told_when_the_program_ends() -> None:
    async def run() -> None:
        hub = Hub()
        async with aiohttp.ClientSession() as client:
            async with serve(WebSettings.of("127.0.0.1", 0, None), hub, dict) as url:
                hub.tell({"status": {}})
                stream = await client.ws_connect(f"{url}live", headers={"Origin": url.rstrip("/")})
                await stream.receive_json()
                ended = asyncio.ensure_future(stream.receive())
                await asyncio.sleep(0)  # lets the reader wait; nothing is waited for
            message = await ended
            assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 1001, "ended")
            await stream.close()
            hub.show({}, b"")  # nobody is there: goes nowhere, and raises nothing
            hub.tell({"now": 1})

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_is_kept_for_pages_is_bounded() -> None:
    hub = Hub()
    for i in range(2000):
        hub.tell({"samples": [[i]], "events": [{"n": i}]})
    kept = json.loads(hub.join().texts[0])
    assert len(kept["samples"]) == 600 and len(kept["events"]) == 50
