"""Errors over HTTP, in the shape of OpenAI's API: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer that is an error. `param`: the field that is wrong; `code`: a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ):
        """retry: seconds after which to ask again, told as Retry-After."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry is None else {"Retry-After": str(retry)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class EngineFault(Refusal):
    """The engine failed, or fell silent: the client could not have asked better, unless the engine says so.

    `refused`: what it says of a request that it finds wrong, else None.
    """

    def __init__(self, message: str, status: int = 502, refused: str | None = None):
        super().__init__(status, message, code="engine_timeout" if status == 504 else "engine_error")
        self.refused = refused
