"""A real Ray cluster on this machine: a head and other nodes, each with processes of its own, to be killed in tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from tests.ports import free_ports

START_SECONDS = 120.0
"""How long a node may take to start on a machine that is busy."""
STORE_BYTES = 80 * 2**20
FAKE_HEAD_NODE_ID = "f" * 51 + "00000"
"""As Ray's stand-in for a cloud calls the head."""
_CLOUD = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
MARK = "TALLY_TEST_CLUSTER"
"""A variable that every process of a node inherits: by it they are found again, whoever their parent is."""


@dataclass(frozen=True)
class Growth:
    """most: nodes beside the head. idle_seconds: after which a node without work goes."""

    most: int = 2
    idle_seconds: float = 2.0


_OF_AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
}
"""Variables of a head that has Ray's stand-in for a cloud."""


class Cluster:
    """The head is node 0; ``nodes`` says how many there are beside it. Use as a context manager, or ``close()`` it.

    cpus: of each node; head_cpus: of the head. resources: custom ones, of node 0, 1, 2 and so on.
    memory: bytes that each node says to have. env: variables for all processes of the cluster.
    token: what clients have to show; without one the cluster lets everybody in.
    grows: the cluster begins with its head alone, and Ray's own autoscaler has nodes come and go, by Ray's stand-in for
    a cloud, whose nodes are processes of this machine. These are not among ``nodes``, and there is no dashboard.

    Temporary files of the cluster and of what runs in it are in ``folder``.
    """

    def __init__(
        self,
        nodes: int = 2,
        *,
        cpus: float = 1,
        head_cpus: float = 0,
        resources: Sequence[Mapping[str, float]] = (),
        memory: int | None = None,
        env: Mapping[str, str] | None = None,
        token: str | None = None,
        grows: Growth | None = None,
    ) -> None:
        self._name = uuid.uuid4().hex
        self._cpus, self._head_cpus, self._memory = cpus, head_cpus, memory
        self._resources, self._grows = list(resources), grows
        # Short: Ray keeps sockets there, whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="tr-"))
        (self.folder / "tmp").mkdir()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.client_env = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        if token is not None:
            self.client_env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        self._env = {
            **inherited,
            **self.client_env,
            "TMPDIR": str(self.folder / "tmp"),
            # Ray makes its workers give way to others: on a busy machine they would hardly be served.
            "RAY_worker_niceness": "0",
            "RAY_num_prestart_python_workers": "0",
            "RAY_raylet_start_wait_time_s": f"{START_SECONDS:g}",
            **({} if grows is None else _OF_AUTOSCALER),
            **(env or {}),
        }
        self._port, self._dashboard_port, *self._other = free_ports(6)
        self._running: dict[int, dict[str, float]] = {}
        self._next = 1
        try:
            self.start_head()
            self.add_nodes(nodes)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        """For ``RAY_ADDRESS`` and ``ray.init``."""
        return f"127.0.0.1:{self._port}"

    @property
    def dashboard(self) -> str:
        """For ``--address``, and to submit Ray jobs to."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def nodes(self) -> list[int]:
        """Numbers of the nodes that were started and not killed, beside the head."""
        return sorted(number for number in self._running if number)

    def start_head(self) -> None:
        """Start the head, or start it again: with the same ports, and without memory of what was.

        Nodes that were there before are lost with the old head; they are replaced by new ones of the same kind.
        """
        before = [number for number in self.nodes if number]
        for number in before:
            self.kill_node(number)
        client, listen, grpc, metrics = self._other
        growing = [] if self._grows is None else [f"--autoscaling-config={self._autoscaling(self._grows)}"]
        started = self._start(
            0,
            self._head_cpus,
            "--head",
            f"--port={self._port}",
            f"--temp-dir={self.folder / 'ray'}",
            f"--include-dashboard={str(self._grows is None).lower()}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={listen}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
            *growing,
        )
        self._await(started)
        if self._grows is None:
            self._await_dashboard()
        self.add_nodes(len(before))

    def _autoscaling(self, grows: Growth) -> Path:
        """What the autoscaler is told, as KubeRay tells it of a group of workers."""
        types = {
            "ray.head.default": {"resources": {"CPU": self._head_cpus}, "node_config": {}, "max_workers": 0},
            "cpu": {
                "resources": {"CPU": self._cpus, "object_store_memory": STORE_BYTES}, "node_config": {},
                "min_workers": 0, "max_workers": grows.most,
            },
        }  # fmt: skip
        # As one of somebody else's: the defaults of Ray's own kind are not in its wheel.
        provider = {"type": "external", "module": _CLOUD, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        config = {
            "cluster_name": self._name, "max_workers": grows.most, "upscaling_speed": 1000,
            "idle_timeout_minutes": grows.idle_seconds / 60, "provider": provider | {"gcs_address": self.address},
            "auth": {}, "available_node_types": types, "head_node_type": "ray.head.default", "file_mounts": {},
            "cluster_synced_files": [], "file_mounts_sync_continuously": False, "initialization_commands": [],
            "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
            "head_start_ray_commands": [], "worker_start_ray_commands": [],
        }  # fmt: skip
        file = self.folder / "autoscaling.json"  # which is YAML, too
        file.write_text(json.dumps(config))
        return file

    def add_node(self) -> int:
        """Start one more node; returns its number."""
        return self.add_nodes(1)[0]

    def add_nodes(self, count: int) -> list[int]:
        """Start so many, one after the other: they would fight for the names of their sockets."""
        numbers = list(range(self._next, self._next + count))
        self._next += count
        for number in numbers:
            self._await(self._join(number))
        return numbers

    def _join(self, number: int) -> subprocess.Popen[str]:
        listen, grpc, metrics = free_ports(3)
        return self._start(
            number,
            self._cpus,
            f"--address={self.address}",
            f"--dashboard-agent-listen-port={listen}",
            f"--dashboard-agent-grpc-port={grpc}",
            f"--metrics-export-port={metrics}",
        )

    def _start(self, number: int, cpus: float, *options: str) -> subprocess.Popen[str]:
        resources = dict(self._resources[number]) if number < len(self._resources) else {}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start"]
        command += [f"--num-cpus={cpus:g}", f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--resources={json.dumps(resources)}", *options]
        if self._memory is not None:
            command.append(f"--memory={self._memory}")
        self._running[number] = resources
        env = {**self._env, MARK: f"{self._name}-{number}"}
        home = self.folder / f"node-{number}"
        home.mkdir(exist_ok=True)
        with home.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, text=True
            )

    def _await(self, started: subprocess.Popen[str]) -> None:
        try:
            code = started.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        assert code == 0, f"a node could not be started:\n{self.logs()}"

    def _await_dashboard(self) -> None:
        request = urllib.request.Request(f"{self.dashboard}/api/version")
        if "RAY_AUTH_TOKEN" in self.client_env:
            request.add_header("Authorization", f"Bearer {self.client_env['RAY_AUTH_TOKEN']}")
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, f"the dashboard does not answer:\n{self.logs()}"
                time.sleep(0.1)

    def logs(self) -> str:
        """What the nodes said when they were started, and the end of what Ray's own processes said."""
        said = [*self.folder.glob("node-*.log"), *self.folder.glob("ray/session_2*/logs/*.err")]
        said += self.folder.glob("ray/session_2*/logs/dashboard_agent.log")
        texts = ((path.name, path.read_text(errors="replace")[-4000:]) for path in sorted(said))
        return "\n".join(f"{name}:\n{text}" for name, text in texts if text)

    def processes(self, number: int | None = None) -> list[psutil.Process]:
        """The processes of one node, or of all; Ray's own first, then what they started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Some of Ray's processes write their title over their environment; those stay in the node's folder.
                mark, home = process.environ().get(MARK, ""), process.cwd().partition(" (deleted)")[0]
                ours = (
                    mark.startswith(f"{self._name}-") or home.startswith(f"{self.folder}/node-")
                    if number is None
                    else mark == f"{self._name}-{number}" or home == f"{self.folder}/node-{number}"
                )
                if ours and alive(process):
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill_node(self, number: int) -> None:
        """As when a machine loses its power: kill -9 of all that runs on the node, at once."""
        del self._running[number]
        self._kill(number)

    def kill_head(self) -> None:
        """The same to the head: its store of the cluster's state, its dashboard, the drivers that run on it."""
        self.kill_node(0)

    def _kill(self, number: int | None) -> None:
        deadline = time.monotonic() + START_SECONDS
        while processes := self.processes(number):
            for process in processes:
                # First all are stopped, so that none sees the others die.
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(processes, timeout=10)
            assert time.monotonic() < deadline, f"these do not end: {processes}"

    def close(self) -> None:
        """End all processes of the cluster, and remove its files."""
        self._running.clear()
        self._kill(None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
