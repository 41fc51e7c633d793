"""This process's connection to a Ray cluster; Ray allows one at a time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

from tally.engines.ray.cluster import require
from tally.errors import ClusterLostError, TallyError
from tally.masking import mask

STORE_BYTES = 200 * 2**20
"""Size of the object store of a Ray that is started here; items do not go through it."""
START_SECONDS = 120
"""How long a Ray that is started here may take: it does on a busy machine."""
ENDING_SECONDS = 10.0
"""How long a disconnection is waited for."""
DISCONNECT_SECONDS = 120.0
"""How long Ray may take to disconnect before this process can connect to a cluster again."""

_disconnecting: threading.Thread | None = None


def connect() -> tuple[Any, bool]:
    """The module ``ray``, connected; and whether it was connected here, and so is to be disconnected here.

    Raises SpecError where Ray is not installed, ClusterLostError, TallyError.
    """
    require()
    ray = _import()
    if _disconnecting is not None:
        _disconnecting.join(DISCONNECT_SECONDS)
        if _disconnecting.is_alive():
            raise ClusterLostError(
                f"Ray is still disconnecting from its former cluster after {DISCONNECT_SECONDS:g} s",
                hint="Start a new process: tally jobs resume JOB",
            )
    if ray.is_initialized():
        return ray, False
    _initialize(ray)
    return ray, True


def _import() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _initialize(ray: Any) -> None:
    """Connect to the cluster that Ray's rules lead to, or start one. Leaves logging and signals as they are."""
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise TallyError(
            f"RAY_ADDRESS={mask(address)} cannot be used by a process that has workers of its own",
            hint="Let the cluster run the job: tally score ... --engine ray --address http://HEAD:8265",
        )
    quiet: dict[str, Any] = {
        "log_to_driver": False,
        "configure_logging": False,
        "include_dashboard": False,
    }
    logging.getLogger("ray").setLevel(logging.ERROR)
    # For a Ray that is started here: its workers get the same priority as those of a local engine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", str(START_SECONDS))
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    try:
        try:
            ray.init(object_store_memory=STORE_BYTES, job_config=_job(), **quiet)
        except ValueError as error:
            if "existing cluster" not in str(error):
                raise
            ray.init(job_config=_job(), **quiet)
    except ConnectionError as error:
        raise ClusterLostError(
            f"the Ray cluster {mask(address) or 'of this machine'} does not answer: {error}",
            hint="Is its head running? Without RAY_ADDRESS, and after 'ray stop', a Ray is started for the job.",
        ) from error
    except Exception as error:  # Ray has no kind of its own for what goes wrong at its start
        if "ersion mismatch" not in str(error):
            raise TallyError(
                f"Ray cannot be started: {error}",
                hint="If this machine is busy, try again; ray status tells of a cluster.",
            ) from error
        raise TallyError(
            f"this process and the Ray cluster have different versions: {error}",
            hint="Install the cluster's versions of Python and Ray where the job is started.",
        ) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    # Ray prints warnings of its daemons (a lost node, say) to standard output, whatever its options say.
    ray._private.worker.print_to_stdstream = _log_output


def _job() -> Any:
    """The description of this process for Ray."""
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _serialize(self) -> Any:
            # Ray has its workers import from the folder that this process is in before anything else.
            ours = {os.path.abspath(each) for each in sys.path}  # noqa: PTH100 - "" is the current folder
            self._py_driver_sys_path = [each for each in self._py_driver_sys_path if each in ours]
            return super()._serialize()

    return Job()


def disconnect(ray: Any) -> None:
    """Disconnect, and end the Ray that was started here. Without a head that takes long, and goes on in a thread."""
    global _disconnecting
    _disconnecting = threading.Thread(target=ray.shutdown, name="tally-ray-end", daemon=True)
    _disconnecting.start()
    _disconnecting.join(ENDING_SECONDS)


def _log_output(data: Mapping[str, Any], *args: Any, **options: Any) -> None:
    logging.getLogger(__name__).debug("Ray: %s", "\n".join(data.get("lines", ())))
