"""A Ray cluster seen from outside: coordinators are started there as Ray jobs.

Only the cluster's HTTP address is needed (its dashboard's): nothing here joins the cluster's network.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, cast

from tally.errors import ClusterLostError, SpecError, TallyError
from tally.masking import mask
from tally.optional import needed

ANSWER_SECONDS = 10.0
"""How long the cluster may take to answer a request."""
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

State = Literal["waiting", "running", "ended", "killed", "stopped", "unknown"]
T = TypeVar("T")


class Cluster:
    """address: of the dashboard, ``http://HEAD:8265``. Raises ClusterLostError when it does not answer."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self._client: Any = None

    def __repr__(self) -> str:
        return f"Cluster({mask(self.address)!r})"

    def version(self) -> str:
        """The version of Ray that it runs."""
        return self._request(lambda client: str(client.ray_version()))

    def check(self) -> None:
        """Raises TallyError unless it answers and runs this machine's version of Ray."""
        import ray

        theirs = self.version()
        if theirs != ray.__version__:
            raise TallyError(
                f"the cluster at {mask(self.address)} runs Ray {theirs}, and here is Ray {ray.__version__}",
                hint=f"Bring both to one version: pip install 'ray[default]=={theirs}', or another image there.",
            )

    def nodes(self) -> list[dict[str, float]]:
        """What each of its machines has: ``CPU``, ``GPU``, ``memory`` in bytes, resources of the cluster's own."""
        found = self._request(lambda client: client.resources_of_nodes())
        return [each["resources_total"] for each in found if each["state"] == "ALIVE"]

    def submit(self, command: str, name: str, environment: Mapping[str, str]) -> None:
        """Start a shell's command inside the cluster, known as ``name`` from then on."""
        variables = {"env_vars": dict(environment)}
        self._request(lambda client: client.submit_job(entrypoint=command, submission_id=name, runtime_env=variables))

    def state(self, name: str) -> State:
        """The state of that process: ``ended`` by itself, ``stopped`` by Ray on request, ``killed`` otherwise.

        ``unknown`` if the cluster does not know it, or not any more.
        """
        from ray.job_submission import JobStatus

        try:
            info = self._request(lambda client: client.get_job_info(name))
        except _RefusedError as error:
            if "404" in str(error):
                return "unknown"
            raise
        states: dict[Any, State] = {
            JobStatus.PENDING: "waiting",
            JobStatus.RUNNING: "running",
            JobStatus.STOPPED: "stopped",
        }
        if info.status == JobStatus.FAILED and (info.driver_exit_code is None or not 0 <= info.driver_exit_code < 128):
            return "killed"
        return states.get(info.status, "ended")

    def log_tail(self, name: str, *, lines: int = 20) -> str:
        """The last lines that the process printed."""
        try:
            text = self._request(lambda client: client.get_job_logs(name))
        except TallyError:
            return ""
        return "\n".join(text.strip().splitlines()[-lines:])

    def _request(self, request: Callable[[Any], T]) -> T:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            try:
                if self._client is None:
                    self._client = _new_client(self.address)
                return request(self._client)
            except AuthenticationError:
                # The cluster wants a token; there may be one on this machine.
                if not _use_token():
                    raise
                self._client = _new_client(self.address)
                return request(self._client)
        except AuthenticationError as error:
            raise _access_denied(self.address, error) from None
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise ClusterLostError(
                f"the cluster at {mask(self.address)} does not answer: {_first_line(error)}",
                hint="Is its head running, and its dashboard reachable from here? 'tally doctor' checks it.",
            ) from None
        except RuntimeError as error:  # Ray's client raises it for any answer but 200
            if " 5" in str(error).partition("status code")[2][:3]:  # while the head starts or stops
                raise ClusterLostError(f"the cluster at {mask(self.address)} cannot answer: {error}") from None
            raise _RefusedError(f"the cluster at {mask(self.address)} refused: {error}") from None


class _RefusedError(TallyError):
    """The cluster answered, and did not do what was asked."""


def _new_client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            # Without a limit, a head that hangs would hang us.
            return super()._do_request(*args, timeout=ANSWER_SECONDS, **kwargs)

        def ray_version(self) -> str:
            return str(self._do_request("GET", "/api/version").json()["ray_version"])

        def resources_of_nodes(self) -> Any:
            answer = self._do_request("GET", "/api/v0/nodes?detail=true")
            return answer.json()["data"]["result"]["result"] if answer.ok else self._raise_error(answer)

    # In Ray, these variables override the address that is given.
    before = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        return Client(address)
    finally:
        os.environ.update(before)


def _use_token() -> bool:
    """Send Ray's token with requests from now on, if this machine has one and ``RAY_AUTH_MODE`` is not set."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    if "RAY_AUTH_MODE" in os.environ:
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)  # it prints advice
    return maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def find(address: str | None = None) -> Cluster | None:
    """The cluster at that address; without one, the cluster that Ray's own rules lead to.

    Those are ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS``, and a cluster that ``ray start`` began on this machine.
    None where there is none of them, or the address is ``local``: then a Ray has to be started.
    Raises TallyError where Ray is not installed, ClusterLostError for a cluster that does not answer.
    """
    require()
    if address is not None:
        return Cluster(address)
    given = next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), None)
    if given == "local":
        return None
    if given is not None and given.startswith(("http://", "https://")):
        return Cluster(given)
    if given is not None and given.startswith("ray://"):
        raise SpecError(
            f"RAY_ADDRESS={mask(given)} is for Ray Client, which Tally does not use",
            hint="Name the cluster by its dashboard: --address http://HEAD:8265",
        )
    from ray._private.services import canonicalize_bootstrap_address

    where = f"RAY_ADDRESS={mask(given)}" if given else "what 'ray start' left in its temporary folder"
    logging.getLogger("ray").setLevel(logging.ERROR)  # it prints advice
    try:
        head = canonicalize_bootstrap_address(cast(Any, given))
        if head is None:
            return None
        host, _, port = head.rpartition(":")
        # Ray itself would wait for a minute.
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        return Cluster(_dashboard_of(head))
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterLostError(
            f"no cluster answers at the address that Ray's rules give ({where}): {_first_line(error)}",
            hint="Start it, name one with --address http://HEAD:8265, or set RAY_ADDRESS=local for one of your own.",
        ) from None


def _dashboard_of(head: str) -> str:
    """The HTTP address of the cluster whose head is at ``host:port``."""
    from ray.dashboard.utils import ray_address_to_api_server_url
    from ray.exceptions import AuthenticationError

    try:
        try:
            return ray_address_to_api_server_url(head)
        except AuthenticationError:
            if not _use_token():
                raise
            return ray_address_to_api_server_url(head)
    except AuthenticationError as error:
        raise _access_denied(head, error) from None


def _access_denied(address: str, error: Exception) -> TallyError:
    return TallyError(
        f"the cluster at {mask(address)} does not let this command in: {_first_line(error)}",
        hint="Give the cluster's token in RAY_AUTH_TOKEN, or a file with it in RAY_AUTH_TOKEN_PATH.",
    )


def require() -> None:
    """Raises SpecError unless Ray is installed, with what clusters need."""
    with needed("engine: ray needs", "ray"):
        import ray.job_submission  # noqa: F401
        import requests  # noqa: F401


def versions() -> str:
    """Versions that must agree between all processes of a job: ``tally 0.1.0, python 3.11, ray 2.50.0``."""
    import ray

    import tally

    python = ".".join(platform.python_version_tuple()[:2])
    return f"tally {tally.__version__}, python {python}, ray {ray.__version__}"


def _first_line(error: BaseException) -> str:
    """The error's own message, without the layers that libraries wrap it in."""
    text = mask(str(error.__context__ or error).strip().partition("\n")[0])
    if (found := re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)) is not None:
        return found[1].lower()
    if "timed out" in text:
        return f"no answer within {ANSWER_SECONDS:g} s"
    return text or type(error).__name__
