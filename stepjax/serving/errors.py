"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, some with more fields."""

import logging
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stepjax.errors import BusyError, ContextLengthError, StepjaxError

_RETRY_SECONDS = 1
_MAX_MESSAGE = 2000  # characters; messages quote requests
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
}

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An error response.

    Attributes:
        param: the field of the request at fault.
        code: distinguishes errors of the same status for programs.
        details: further fields of the error, for programs too.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, object] | None = None,
    ):
        self.status, self.message = status, _valid(message[:_MAX_MESSAGE])
        self.param, self.code = None if param is None else _valid(param), code
        self.headers, self.details = dict(headers or {}), dict(details or {})
        super().__init__(self.message)

    def body(self) -> dict:
        kind = _TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**fields, **self.details}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


class TooLongError(ApiError):
    """A prompt is too long.

    Attributes:
        excess: about how many tokens too long.
    """

    def __init__(self, message: str, *, param: str | None, excess: int):
        super().__init__(400, message, param=param, code="context_length_exceeded")
        self.excess = excess


def _valid(text: str) -> str:
    """Escapes lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def busy(message: str) -> ApiError:
    return ApiError(429, message, code="server_busy", headers={"retry-after": str(_RETRY_SECONDS)})


def shutting_down() -> ApiError:
    message = "the server is shutting down: retry later, or on another server"
    return ApiError(503, message, code="shutting_down", headers={"retry-after": "5", "connection": "close"})


def engine_failed() -> ApiError:
    return ApiError(500, "the engine could not finish the request; see the server's log", code="engine_failed")


def as_api_error(error: BaseException) -> ApiError:
    """The response to an exception. User errors are shown; anything else is logged and hidden."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return busy(str(error))
    if isinstance(error, ContextLengthError):
        return TooLongError(str(error), param=None, excess=error.excess)
    if isinstance(error, StepjaxError):
        return ApiError(400, str(error))
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; see the server's log", code="internal_error")


async def answer_exception(request: Request, error: Exception) -> Response:
    """Handles exceptions from routes, and the framework's for unknown paths and methods."""
    if not isinstance(error, HTTPException):
        return as_api_error(error).response()
    messages = {
        404: f"{request.url.path} does not exist; use /v1/chat/completions, /v1/completions or /v1/models",
        405: f"{request.url.path} does not support {request.method}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()
