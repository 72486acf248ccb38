"""Every failure the product can answer, in order of precedence.

A `Failure` knows its HTTP status, its `type` and `code` in the OpenAI envelope, its public
text and whether sending the same request again can help. Clients see the public text only.
"""

from collections.abc import Mapping

import msgspec

_encoder = msgspec.json.Encoder()


class Failure(Exception):
    """Base of every answerable failure. `headers` are extra response headers."""

    status = 500
    type = "api_error"
    code = "internal_error"
    message = "Something went wrong on our side. Nothing was charged."
    retryable: bool | None = None  # None: the status says it; else sent as x-should-retry

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message or self.message)
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.metadata = metadata

    @property
    def text(self) -> str:
        return str(self.args[0])

    def body(self, request_id: str | None = None) -> bytes:
        """The OpenAI error envelope as JSON bytes."""
        error: dict[str, object] = {
            "message": self.text,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if request_id is not None:
            error["request_id"] = request_id
        if self.metadata:
            error["metadata"] = dict(self.metadata)
        return _encoder.encode({"error": error})

    def headers(self) -> list[tuple[str, str]]:
        """Extra response headers: Retry-After and x-should-retry where they apply."""
        found = []
        if self.retry_after_seconds is not None:
            found.append(("retry-after", str(max(1, self.retry_after_seconds))))
        if self.retryable is not None:
            found.append(("x-should-retry", "true" if self.retryable else "false"))
        return found


# 400: the request itself


class InvalidRequest(Failure):
    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    message = "The request is not valid."


class InvalidJson(InvalidRequest):
    code = "invalid_json"
    message = "The request body is not valid JSON."


class MissingParameter(InvalidRequest):
    code = "missing_parameter"
    message = "A required parameter is missing."


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"
    message = "The request has a parameter that does not exist."


class UnboundedCost(InvalidRequest):
    code = "unbounded_cost"
    message = "The cost of this request cannot be bounded beforehand."


class MalformedHttp(InvalidRequest):
    code = "malformed_http"
    message = "The request is not well-formed HTTP/1.1."


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"
    message = "The request did not arrive in time."


class BodyTooLarge(InvalidRequest):
    status = 413
    code = "request_too_large"
    message = "The request body is too large."


class ExpectationFailed(InvalidRequest):
    status = 417
    code = "expectation_failed"
    message = "Only `Expect: 100-continue` is understood."


class HeadTooLarge(InvalidRequest):
    status = 431
    code = "request_head_too_large"
    message = "The request head is too large."


class NotFound(InvalidRequest):
    status = 404
    code = "not_found"
    message = "There is nothing at this path."


class MethodNotAllowed(InvalidRequest):
    status = 405
    code = "method_not_allowed"
    message = "This path does not answer that method."


class ModelNotFound(InvalidRequest):
    status = 404
    code = "model_not_found"
    message = "The model does not exist or is not offered here."


class Conflict(InvalidRequest):
    status = 409
    code = "conflict"
    message = "The request conflicts with the present state."
    retryable = False


class IdempotencyInProgress(InvalidRequest):
    status = 409
    code = "idempotency_in_progress"
    message = "A request with this idempotency key is still in progress."


class IdempotencyMismatch(InvalidRequest):
    status = 422
    code = "idempotency_mismatch"
    message = "This idempotency key was used with another request."
    retryable = False


# 401, 403: who asks


class InvalidKey(Failure):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    message = "No valid API key was given. Send `Authorization: Bearer inf_…`."


class AccountSuspended(Failure):
    status = 403
    type = "permission_error"
    code = "account_suspended"
    message = "This workspace is suspended. Its balance is kept."


class ScopeMissing(Failure):
    status = 403
    type = "permission_error"
    code = "insufficient_scope"
    message = "This key may not do that."


class ModelNotAllowed(Failure):
    status = 403
    type = "permission_error"
    code = "model_not_allowed"
    message = "This key may not use that model."


# 429: passes by waiting


class RateLimited(Failure):
    status = 429
    type = "requests"
    code = "rate_limit_exceeded"
    message = "Rate limit reached: requests per minute."


class TokensLimited(RateLimited):
    type = "tokens"
    message = "Rate limit reached: tokens per minute."


class DailyTokensLimited(RateLimited):
    type = "tokens"
    message = "Limit reached: tokens per day (UTC)."


class ConcurrencyLimited(RateLimited):
    type = "concurrency"
    message = "Limit reached: requests at the same time."


class RequestAboveTokenLimit(RateLimited):
    type = "tokens"
    message = "This request alone could use more tokens than the key's limit allows."
    retryable = False


# 403, 402: money


class PlanLimitExceeded(Failure):
    status = 403
    type = "permission_error"
    code = "plan_limit_exceeded"
    message = "The key's cost cap does not cover this request."


class InsufficientCredit(Failure):
    status = 402
    type = "insufficient_quota"
    code = "INSUFFICIENT_CREDIT"
    message = "The balance does not cover this request."
    retryable: bool | None = False


class CreditInFlight(InsufficientCredit):
    """The balance would do, were it not held by requests in flight: waiting can help."""

    retryable: bool | None = None


# 502, 503, 504: our side or the provider's


class ProviderRefused(Failure):
    """The provider called the request wrong: its status and text, scrubbed of secrets."""

    type = "invalid_request_error"
    code = "provider_refused"

    def __init__(self, status: int, message: str, code: str | None, param: str | None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code or type(self).code


class ProviderLimited(Failure):
    status = 429
    type = "requests"
    code = "provider_rate_limited"
    message = "The provider's own rate limit was reached. Nothing was charged."


class ProviderFailed(Failure):
    status = 502
    code = "provider_error"
    message = "The provider failed to answer this request. Nothing was charged."


class ProviderUnreachable(ProviderFailed):
    code = "provider_unreachable"
    message = "The provider cannot be reached. Nothing was charged."


class ProviderBrokeOff(ProviderFailed):
    code = "provider_broke_off"
    message = "The provider broke off its answer."


class ProviderGarbled(ProviderFailed):
    code = "provider_bad_response"
    message = "The provider's answer could not be understood. Nothing was charged."


class ProviderMisconfigured(ProviderFailed):
    code = "provider_misconfigured"
    message = "The provider refused our account or model. Nothing was charged."


class ProviderTimeout(ProviderFailed):
    status = 504
    code = "provider_timeout"
    message = "The provider did not answer in time. Nothing was charged."


class Unavailable(Failure):
    """Our own infrastructure: never a 401, always with Retry-After."""

    status = 503
    code = "service_unavailable"
    message = "The service is briefly unavailable. Nothing was charged."

    def __init__(self, message: str | None = None, retry_after_seconds: int = 1) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
