"""What stands between the network and the page: who may ask, for what, and what the browser may load."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 4 * 1024 * 1024
"""Bytes: a conversation of the longest context a LLaMA has, several times over."""

# All that the page itself asks for. Gradio has more doors: uploads, files, proxies to other hosts, saved runs.
_PAGES = {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt"}
_FILES = ("/assets/", "/static/", "/svelte/")
_CALLS = {"queue/join", "queue/data", "run/predict", "info", "startup-events", "cancel", "reset", "app_id"}
_API = "/gradio_api/"

# Gradio builds its page with scripts of its own that stand in it, and compiles listeners; nothing comes from elsewhere,
# and no word of an answer can make the browser ask another host for a picture.
_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)


class Gate:
    """ASGI middleware. Without a password only requests that name this machine itself pass: a page of another site
    cannot ask through a name that it points at the loopback address. With one, HTTP Basic authentication, any name.
    """

    def __init__(self, app: ASGIApp, password: str | None):
        self.app = app
        self._password = password.encode() if password is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # Gradio speaks HTTP alone
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await (self.app if refusal is None else refusal)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._password is None and not _is_loopback(host):
            return PlainTextResponse("this page answers to localhost alone\n", 421)
        if origin is not None and origin.partition("://")[2] != host:
            return PlainTextResponse("no other site may ask\n", 403)
        if self._password is not None and not self._knows(headers.get("authorization", "")):
            asks = {"WWW-Authenticate": 'Basic realm="llama-ft chat: any name, and the password", charset="UTF-8"'}
            return PlainTextResponse("the chat page wants its password\n", 401, asks)
        if not _is_offered(scope["path"]):
            return PlainTextResponse("there is nothing here\n", 404)
        return _size_refusal(headers) if scope["method"] == "POST" else None

    def _knows(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        if kind.lower() != "basic" or self._password is None:
            return False
        try:
            _, _, password = base64.b64decode(given, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(password, self._password)


def _size_refusal(headers: Headers) -> Response | None:
    length = headers.get("content-length", "")
    if not length.isdigit():
        return PlainTextResponse("how long is it?\n", 411)
    return PlainTextResponse(f"more than {LARGEST_BODY} bytes\n", 413) if int(length) > LARGEST_BODY else None


def _is_loopback(host: str) -> bool:
    """Whether a Host header names this machine to itself."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_offered(path: str) -> bool:
    if path in _PAGES or path.startswith(_FILES):
        return True
    if not path.startswith(_API):
        return False
    call = path.removeprefix(_API).rstrip("/")
    return call in _CALLS or call.startswith("heartbeat/")
