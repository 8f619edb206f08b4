"""Guard of `normfree ui --team`: users of MLflow write nowhere but in the team's bucket, run nothing, and guess no passwords.

MLflow lets each user name the place of an experiment's files (`artifact_location`, `file:///etc` too), of a trace's (a tag) and
of a model version's (`source`), and goes there with the server's own rights. So every place is checked where MLflow opens it, and
that of an experiment also where it enters, because clients would go there as well.
"""

import base64
import binascii
import ipaddress
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from orchestration.serve.own_guard import answer

WINDOW_S = 300.0
FAILURES, FAILURES_OF_ADDRESS = 20, 200
"""Failed log-ins within the window: of one user from one address, and of any users from it. Shared out to the processes."""
MOST_KEYS = 10_000
ASSISTANT = "/mlflow/assistant"


def is_within(location: str, destination: str) -> bool:
    """Whether the URI `location` is `destination` or below it; the server's own scheme, without a host, leads there too."""
    for root in ("mlflow-artifacts:", destination.rstrip("/")):
        rest = location.removeprefix(root)
        if location.startswith(root) and (not rest or rest[0] == "/") and not rest.startswith("//"):
            return not re.search(r"[\\%?#\x00-\x1f]", rest) and ".." not in rest.split("/")
    return False


def confine_files(destination: str) -> None:
    """From here on the MLflow of this process opens files in `destination` alone, and takes no experiment with another place."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import handlers
    from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def check(location: str) -> None:
        if not is_within(location, destination):
            raise MlflowException.invalid_parameter_value(
                f"files of this server lie in its bucket and nowhere else, and not at {location!r}: leave out the location"
            )

    class Store(SqlAlchemyStore):
        def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> Any:
            if artifact_location:
                check(artifact_location)
            return super().create_experiment(name, artifact_location, tags)

    def confined(make: Callable[..., Any]) -> Callable[..., Any]:
        def checked(artifact_uri: str, *arguments: Any, **options: Any) -> Any:
            check(artifact_uri)
            return make(artifact_uri, *arguments, **options)

        return checked

    def opened(store_uri: str, artifact_uri: str) -> Any:
        return Store(store_uri, artifact_uri)

    handlers._tracking_store_registry.register("postgresql", opened)
    repositories: dict[str, Any] = get_registered_artifact_repositories()
    for scheme, make in list(repositories.items()):
        repositories[scheme] = confined(make)


class LoginLimit:
    """The ASGI application `app`; after too many failed log-ins of a user from an address, or from an address, 429 for a while.

    MLflow's assistant, which runs commands on the server for whoever seems to call from it, is not answered at all.
    """

    def __init__(self, app: Any, *, num_processes: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._most = [max(1, n // num_processes) for n in (FAILURES, FAILURES_OF_ADDRESS)]
        self._failures: OrderedDict[tuple[str, str | None], deque[float]] = OrderedDict()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if ASSISTANT in scope.get("path", ""):
            await answer(send, 403, [(b"content-type", b"text/plain")], b"There is no assistant on this server.\n")
            return
        user = _user(scope)
        if user is None:
            await self._app(scope, receive, send)
            return
        address = _network(scope)
        keys = [(address, user), (address, None)]
        if self._is_blocked(keys):
            await _refuse(send)
            return
        refused = False

        async def watched(message: dict[str, Any]) -> None:
            nonlocal refused
            if message["type"] == "http.response.start":
                # Of many tries at once all but the first few learn nothing either.
                refused = self._is_blocked(keys)
                if message["status"] == 401:
                    self._count(keys)
                if refused:
                    await _refuse(send)
            if not refused:
                await send(message)

        await self._app(scope, receive, watched)

    def _is_blocked(self, keys: list[tuple[str, str | None]]) -> bool:
        oldest = self._clock() - WINDOW_S
        for key, most in zip(keys, self._most, strict=True):
            times = self._failures.get(key)
            while times and times[0] < oldest:
                times.popleft()
            if times and len(times) >= most:
                return True
        return False

    def _count(self, keys: list[tuple[str, str | None]]) -> None:
        for key, most in zip(keys, self._most, strict=True):
            self._failures.setdefault(key, deque(maxlen=most)).append(self._clock())
            self._failures.move_to_end(key)
        while len(self._failures) > MOST_KEYS:
            self._failures.popitem(last=False)


async def _refuse(send: Any) -> None:
    headers = [(b"content-type", b"text/plain"), (b"retry-after", str(int(WINDOW_S)).encode())]
    await answer(send, 429, headers, b"Too many failed log-ins: wait five minutes.\n")


def _user(scope: dict[str, Any]) -> str | None:
    """The user that a request names, None where it has no credentials; "" where nobody can read them."""
    for name, value in scope.get("headers", ()):
        if name.lower() == b"authorization":
            try:
                return base64.b64decode(value.split(None, 1)[1]).partition(b":")[0].decode()[:256]
            except (IndexError, binascii.Error, UnicodeDecodeError):
                return ""
    return None


def _network(scope: dict[str, Any]) -> str:
    """The client's address; the network of 64 bits of an IPv6 one, which has all the addresses in it."""
    host = (scope.get("client") or ("",))[0]
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return str(host)
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
