"""What goes wrong, as OpenAI's clients read it: `{"error": {"message", "type", "param", "code"}}` and a status."""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from jaxserve.checks import ParameterError
from jaxserve.engine.errors import EngineDeadError

FORM = re.compile(r"str|list\[.*\]")  # what pydantic calls a possible type of a field
TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}


class ApiError(Exception):
    """An answer other than 200. `retry_after` is in seconds."""

    def __init__(self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """The JSON object that clients read."""
        # Text of a request may hold halves of surrogate pairs, which UTF-8 cannot write.
        message = self.message.encode("utf-8", "backslashreplace").decode("utf-8")
        kind = TYPES.get(self.status, "BadRequestError")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """The answer for any exception; what is nobody's fault but ours is a 500 that names it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, EngineDeadError):
        return ApiError(500, str(error))
    if isinstance(error, ParameterError):
        return ApiError(400, str(error), param=error.parameter)
    if isinstance(error, ValueError | TypeError | OverflowError | RecursionError):
        return ApiError(400, str(error) or type(error).__name__)
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error) or "the request took too long", retry_after=1)
    return ApiError(500, f"{type(error).__name__}: {error}")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body; the value itself is not repeated, it may be anything."""
    found: list[Mapping[str, Any]] = list(error.errors())
    if not found:
        return ApiError(400, "the request is not valid")
    first = found[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "header")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    param = ".".join(place) or None
    if len(place) > 1 and FORM.fullmatch(place[1]):  # of several forms that a field may have, none fits
        forms = dict.fromkeys(str(error["loc"][2]) for error in found if error["loc"][1] == place[0])
        return ApiError(400, f"{place[0]} must be {' or '.join(forms)}", param=place[0])
    rest = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return ApiError(400, f"{param or 'the body'}: {first['msg']}{rest}", param=param)
