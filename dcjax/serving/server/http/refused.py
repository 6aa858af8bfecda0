"""What is refused, and how that is written."""

from __future__ import annotations

from starlette.responses import JSONResponse


class Refused(Exception):
    """A request that cannot be served, with the HTTP status that says so."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def answer(self) -> JSONResponse:
        """It in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": told}, status_code=self.status)
