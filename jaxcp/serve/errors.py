# SPDX-License-Identifier: Apache-2.0
"""Errors for clients, in OpenAI's and in Anthropic's form."""

from typing import Any

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
WORTH_ANOTHER_TRY = (408, 429, 503)


class Refusal(Exception):
    """An error for the client.

    Args:
      status: of HTTP.
      code: a word for programs, as OpenAI has them.
      param: the field that is wrong.
      retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "api_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that official clients obey: whether to try again, and when."""
        again = "true" if self.status in WORTH_ANOTHER_TRY else "false"
        headers = {"x-should-retry": again}
        if self.retry_after is not None:
            headers["retry-after"] = str(self.retry_after)
        return headers

    def openai(self) -> dict[str, Any]:
        """Its body as OpenAI's clients read it."""
        return {
            "error": {
                "message": self.message, "type": self.type, "param": self.param, "code": self.code,
            }
        }  # fmt: skip

    def anthropic(self) -> dict[str, Any]:
        """Its body as Anthropic's clients read it."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def wrong(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """A request that cannot be honored as it stands."""
    return Refusal(400, message, param=param, code=code)


def not_done(param: str, instead: str = "leave it out") -> Refusal:
    """A field that this server does not honor."""
    return wrong(f"{param} is not supported here: {instead}", param, "unsupported_parameter")


def failed(error: BaseException) -> Refusal:
    """An answer that the engine could not finish."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, FloatingPointError):
        return Refusal(500, str(error), code="generation_failed")
    if isinstance(error, ValueError):  # a grammar that leaves no token, or has grown too large
        return wrong(str(error), code="generation_failed")
    kind = type(error).__name__
    return Refusal(500, f"the step that ran this answer failed ({kind})", code="engine_error")
