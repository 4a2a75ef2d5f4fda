"""The live page's server: who may see it, and what they are sent."""

import asyncio
import errno
import hmac
import ipaddress
import json
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlencode, urlsplit

from affect_demos._hub import Hub, Viewer

if TYPE_CHECKING:
    from aiohttp import web

    _Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

__all__ = ["WebSettings", "serve"]

# aiohttp and not FastAPI on uvicorn: one library that serves HTTP and websockets. The other way is a framework, a
# validation library, a server and a websocket library, for seven routes that validate nothing.

_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/traces.js": ("traces.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_MOST_VIEWERS = 8
_FAREWELL_S = 2.0


@dataclass(frozen=True)
class WebSettings:
    """Where the page is served, and to whom.

    Attributes:
        host: address to listen on.
        port: to listen on; 0 picks a free one.
        token: what a browser must bring; None needs none.
        made: whether the token was made here, and so has to be shown.
        alone: whether only this machine can reach the page.
    """

    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    made: bool = False
    alone: bool = True

    @classmethod
    def of(cls, host: str, port: int, token: str | None) -> "WebSettings":
        """With a token wherever one is needed; "auto" makes one in any case."""
        alone = _is_loopback(host)
        made = token == "auto" or (token is None and not alone)
        return cls(host, port, secrets.token_urlsafe(24) if made else token, made, alone)


@asynccontextmanager
async def serve(settings: WebSettings, hub: Hub, summary: Callable[[], dict[str, Any]]) -> AsyncIterator[str]:
    """Serves until the block ends.

    Args:
        settings: where and to whom.
        hub: what is shown.
        summary: the session so far; called in another thread.

    Yields:
        The address for a browser.

    Raises:
        AffectError: the port is taken, or the address is not this machine's.
    """
    from aiohttp import web

    from affect_edge import AffectError

    page = _Page(settings, hub, summary)
    runner = web.AppRunner(page.app(), access_log=None, shutdown_timeout=_FAREWELL_S)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port)
        try:
            await site.start()
        except OSError as error:
            raise AffectError(_refusal(settings, error)) from error
        port: int = runner.addresses[0][1]
        page.cookie = f"affect_edge_{port}"
        hub.open(asyncio.get_running_loop())
        yield _url(settings, port)
    finally:
        hub.close()
        await runner.cleanup()


class _Page:
    """The routes."""

    def __init__(self, settings: WebSettings, hub: Hub, summary: Callable[[], dict[str, Any]]) -> None:
        self._settings, self._hub, self._summary = settings, hub, summary
        folder = Path(__file__).parent / "web"
        # Read once: nothing of the disk is touched, or reachable, while the page is served.
        self._files = {path: (folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        self._names = {"localhost", socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        # The cookie says that the token was right; it is not the token, which stays out of the browser's store.
        self._pass = secrets.token_urlsafe(32)
        self._sockets: set[web.WebSocketResponse] = set()
        # Cookies know no ports: two of these on one machine need two names.
        self.cookie = "affect_edge"

    def app(self) -> "web.Application":
        """The application of aiohttp."""
        from aiohttp import web

        # The decorator marks functions, and a method cannot be marked.
        @web.middleware
        async def guard(request: web.Request, handler: "_Handler") -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(middlewares=[guard], client_max_size=1024)
        for path in _FILES:
            app.router.add_get(path, self._file)
        app.router.add_get("/summary.json", self._download)
        app.router.add_get("/live", self._live)
        app.on_response_prepare.append(self._protect)
        app.on_shutdown.append(self._farewell)
        return app

    async def _guard(self, request: "web.Request", handler: "_Handler") -> "web.StreamResponse":
        """Refuses other people's names for this machine, and browsers without the token."""
        from aiohttp import web

        if not self._is_us(request.host):
            # A page elsewhere can point its own name at this address; it cannot make the browser send ours.
            raise web.HTTPForbidden(text="This page goes by another name. Open it by its address.\n")
        token = self._settings.token
        if token is None or _same(request.cookies.get(self.cookie, ""), self._pass):
            return await handler(request)
        if request.path == "/" and _same(request.query.get("token", ""), token):
            # The page itself and no redirect: browsers that followed a link from elsewhere leave strict cookies out
            # of the redirected request. The page takes the token out of the address bar.
            response = await handler(request)
            response.set_cookie(self.cookie, self._pass, httponly=True, samesite="Strict", path="/")
            return response
        raise web.HTTPUnauthorized(
            text="This page needs its token: open the address that affect-dashcam printed, with ?token= in it.\n"
        )

    async def _file(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _download(self, request: "web.Request") -> "web.Response":
        from aiohttp import web

        text = json.dumps(await asyncio.to_thread(self._summary), indent=1, ensure_ascii=False) + "\n"
        headers = {"Content-Disposition": 'attachment; filename="affect-summary.json"'}
        return web.Response(text=text, content_type="application/json", headers=headers)

    async def _live(self, request: "web.Request") -> "web.StreamResponse":
        """The websocket: texts are news, binary messages are pictures; the page answers each picture it has drawn."""
        from aiohttp import WSMsgType, web

        origin = urlsplit(request.headers.get("Origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc != request.host:
            raise web.HTTPForbidden(text="Only this server's own page may watch.\n")
        if len(self._sockets) >= _MOST_VIEWERS:
            raise web.HTTPServiceUnavailable(text=f"{_MOST_VIEWERS} pages are open already; close one.\n")
        # No compression: pictures are compressed already.
        stream = web.WebSocketResponse(heartbeat=15.0, max_msg_size=1024, compress=False)
        await stream.prepare(request)
        self._sockets.add(stream)
        viewer = self._hub.join()
        feed = asyncio.create_task(self._feed(stream, viewer))
        try:
            async for message in stream:
                if message.type == WSMsgType.TEXT and message.data == "drawn":
                    viewer.drawn()
        finally:
            self._hub.leave(viewer)
            self._sockets.discard(stream)
            feed.cancel()
            await asyncio.gather(feed, return_exceptions=True)
        return stream

    async def _feed(self, stream: "web.WebSocketResponse", viewer: Viewer) -> None:
        while not stream.closed:
            await viewer.wake.wait()
            viewer.wake.clear()
            while viewer.texts:
                await stream.send_str(viewer.texts.popleft())
            if (picture := self._hub.picture(viewer)) is not None:
                await stream.send_bytes(picture)

    async def _protect(self, request: "web.Request", response: "web.StreamResponse") -> None:
        # Some browsers do not take websockets for "self".
        here = f"ws://{request.host} wss://{request.host}" if self._is_us(request.host) else ""
        response.headers.update(
            {
                "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
                f"img-src 'self' blob:; connect-src 'self' {here}; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cross-Origin-Opener-Policy": "same-origin",
                "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
                "Cache-Control": "no-store",
            }
        )

    async def _farewell(self, app: "web.Application") -> None:
        from aiohttp import WSCloseCode

        for stream in tuple(self._sockets):
            await stream.close(code=WSCloseCode.GOING_AWAY, message=b"ended")

    def _is_us(self, host: str) -> bool:
        """Whether a Host header names this machine. Numbers cannot be another's name for it, so any will do where
        others may come."""
        name = _host_of(host)
        if name in self._names or name == self._settings.host.lower():
            return True
        if self._settings.alone:
            return _is_loopback(name)
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _host_of(host: str) -> str:
    """Of HOST:PORT, [IPv6]:PORT or either without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _url(settings: WebSettings, port: int) -> str:
    host = settings.host
    if host in ("0.0.0.0", "::"):
        host = _address()
    host = f"[{host}]" if ":" in host else host
    if settings.token is None:
        return f"http://{host}:{port}/"
    # One that was given is known already, and a terminal may be seen by others.
    query = urlencode({"token": settings.token}) if settings.made else "token=..."
    return f"http://{host}:{port}/?{query}"


def _address() -> str:
    """This machine's address in its network, where it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # for documentation only (RFC 5737); connecting UDP sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _refusal(settings: WebSettings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is in use, perhaps by another affect-dashcam; --port 0 picks a free one"
    if error.errno == errno.EACCES:
        return f"{where}: not allowed to listen there; ports from 1024 need no rights"
    return f"{where}: cannot listen there: {error.strerror or error}; --host takes an address of this machine"
