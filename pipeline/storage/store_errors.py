"""What an object store's error means: whether asking again may help, and the one sentence that says what helps otherwise.

S3's words (`Code`) and the status of the answer decide; s3fs keeps both in the cause of the error that it raises. Stores that
are merely compatible answer 400 or 501 to what they do not know, and have words of their own for a full one.
Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

# Answers, not accidents: asking again would not change them.
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Errors of aiobotocore and aiohttp on the way that do not derive from OSError; the checksum's may be a damaged transfer.
_TRANSIENT_NAMES = frozenset(
    {
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ConnectionClosedError",
        "ResponseStreamingError",
        "ClientPayloadError",
        "ServerDisconnectedError",
        "HTTPClientError",
        "IncompleteReadError",
        "FlexibleChecksumError",
    }
)
_UNREACHED_NAMES = frozenset({"ClientConnectorError", "ClientConnectorDNSError", "ProxyConnectionError", "SSLError"})
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_ELSEWHERE = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301"}
_FULL = ("quota", "storagefull", "storagelimit", "insufficientstorage", "insufficientcapacity")
_NO_MD5 = {"MissingContentMD5", "InvalidDigest"}
CHECKSUM_SETTINGS = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


@dataclass(frozen=True)
class Answer:
    """What an S3 store said with an error; empty where it said nothing."""

    code: str = ""
    """A number where it sent no body, as to every HEAD."""
    status: int = 0
    operation: str = ""
    text: str = ""
    date: str = ""
    """By the store's clock."""


def answer_of(error: BaseException) -> Answer:
    """The store's answer that an error of s3fs or botocore stands for."""
    for each in (error, error.__cause__):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):
            detail, about = response.get("Error", {}), response.get("ResponseMetadata", {})
            return Answer(
                str(detail.get("Code", "")),
                int(about.get("HTTPStatusCode") or 0),
                str(getattr(each, "operation_name", "")),
                " ".join(str(detail.get("Message", "")).split())[:160],
                str(about.get("HTTPHeaders", {}).get("date", "")),
            )
    return Answer()


def is_transient(error: BaseException) -> bool:
    """Whether asking a store again may help."""
    if type(error).__name__ in _TRANSIENT_NAMES:
        return True
    answer = answer_of(error)
    is_answered = isinstance(error, _PERMANENT) or answer.status == 501 or _is_full(answer)
    return isinstance(error, OSError) and not is_answered


def is_throttled(error: BaseException) -> bool:
    """Whether an S3 store answered that it has too much to do."""
    answer = answer_of(error)
    return answer.status in (429, 503) or "SlowDown" in answer.code or "Throttl" in answer.code


def is_overload(error: BaseException) -> bool:
    """Whether fewer requests at a time may help: a store that asks for patience, or did not answer in time."""
    return is_throttled(error) or type(error).__name__ in ("ReadTimeoutError", "ConnectTimeoutError")


def sentence(error: BaseException, url: str) -> str | None:
    """What the user can change, where a store's error is of that kind; None where it is not."""
    answer, kind = answer_of(error), type(error).__name__
    detail = f"{answer.code}: {answer.text}" if answer.text and answer.text != answer.code else answer.code
    what = f"{answer.operation or 'a request'} of {url} ({detail or ' '.join(str(error).split())[:160]})"
    if kind == "NoCredentialsError":
        return f"no credentials for {url}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if kind == "FlexibleChecksumError":
        return (
            f"what the store sends of {url} does not have the checksum that it sends along, again and again: the object is "
            "damaged, or the store gives the whole object's for a part; then set AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
        )
    if answer.code in _SKEWED:
        return (
            f"the store refuses {what}: the clock of this machine is {_skew(answer.date)} the store's; set it by the "
            "network's time (timedatectl set-ntp true, or chrony)"
        )
    if _is_full(answer):
        return f"the store has no room for {url} ({detail}): raise the quota of its bucket or user, or delete there"
    if answer.code in _EXPIRED:
        return f"the store refuses {what}: the credentials have expired; get new ones (AWS_SESSION_TOKEN, or sign in again)"
    if answer.code in _ELSEWHERE:
        return f"the store refuses {what}: set AWS_DEFAULT_REGION to the bucket's region, and AWS_ENDPOINT_URL to its server"
    if answer.code == "NoSuchBucket" or (kind == "FileNotFoundError" and "bucket does not exist" in str(error)):
        return f"the bucket of {url} does not exist: create it, or mend its name"
    if answer.code in _NO_MD5:
        return (
            f"the store refuses {what}: it wants a checksum with each object, as buckets with locked objects do; set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_supported, or use a bucket without the lock"
        )
    if answer.status in (400, 405, 411, 501) and not answer.code.startswith("RequestTimeout"):
        return f"the store does not take {what}: if it does not know S3's newer checksums, set {CHECKSUM_SETTINGS}"
    if isinstance(error, PermissionError):
        return (
            f"the store refuses {what}: check the credentials of this machine (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or "
            "their file) and what they may do there"
        )
    return None


class Silent(OSError):
    """What `silence` said of an error. Between processes an error loses its cause, and with it the store's answer."""


def silence(error: BaseException) -> str | None:
    """Of a store that was not reached, or only asked for patience: a sentence for the end of a command; None for other errors.

    No `UserError` where it happens: what cannot be read now is no damaged checkpoint, and a save is tried again."""
    if isinstance(error, Silent):
        return str(error)
    kind = type(error).__name__
    if kind not in _TRANSIENT_NAMES | _UNREACHED_NAMES and not is_throttled(error) and answer_of(error).status < 500:
        return None
    said = " ".join(str(error).split())[:200]
    return (
        f"the object store does not answer ({kind}: {said}): see whether it is up, whether AWS_ENDPOINT_URL is its address, and "
        "the network between; the same command goes on then"
    )


def _is_full(answer: Answer) -> bool:
    return answer.status == 507 or (answer.status != 429 and any(word in answer.code.lower() for word in _FULL))


def _skew(date: str) -> str:
    """How far this machine's clock is from the store's."""
    try:
        ahead_s = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):
        return "not"
    if abs(ahead_s) < 60:  # the answer's date is then of a gateway in front of the store
        return "not"
    return f"{abs(ahead_s) / 60:.0f} min {'ahead of' if ahead_s > 0 else 'behind'}"
