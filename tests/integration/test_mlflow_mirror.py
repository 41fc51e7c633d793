"""Runs are brought to a real MLflow server, once, with all that they have."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest
from click.testing import CliRunner
from tests.environments import python_of
from tests.extent import FULL
from tests.ports import free_ports
from tests.waiting import wait_for

import tally
from tally.cli.main import cli
from tally.errors import RunError
from tally.training.runs.mlflow_mirror import mirror
from tally.training.runs.store import RunStore


@pytest.mark.skipif(not FULL, reason="MLflow's server is asked with TALLY_TEST_FULL=1")
def test_runs_are_mirrored_on_a_server(
    tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    words = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    log = (tmp_path / "server.txt").open("w")
    server = subprocess.Popen(
        [python_of("mlflow", pytestconfig), *words], stdout=log, stderr=log, start_new_session=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    try:

        def answers() -> bool:
            try:
                return httpx2.get(f"{url}/health").is_success
            except httpx2.HTTPError:
                return False

        wait_for(answers, server, seconds=300, told=lambda: (tmp_path / "server.txt").read_text())
        monkeypatch.setenv("TALLY_MLFLOW", url)
        with tally.training.run("pets", {"lr": 0.1, "net@2": "x"}) as run:
            for step in range(1500):
                run.log({"mAP@0.5:0.95": step, "loss": 1 / (1 + step)}, step=step)
            run.log("odd", math.nan)
            run.log_image("seen", np.zeros((5, 6, 3), np.uint8))
            run.tags["area"] = "x"
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=url)
        [there] = client.search_runs([client.get_experiment_by_name("tally").experiment_id])
        assert (there.info.status, there.info.run_name, there.data.tags["tally.run"]) == ("FINISHED", "pets", run.id)
        assert there.data.params == {"lr": "0.1", "net_2": "x"}
        assert there.data.tags["area"] == "x"
        history = client.get_metric_history(there.info.run_id, "mAP_0.5:0.95")
        assert [(each.step, each.value) for each in history] == [(step, float(step)) for step in range(1500)]
        assert math.isnan(there.data.metrics["odd"])
        assert client.list_artifacts(there.info.run_id, "pictures/seen")
        told = CliRunner().invoke(cli, ["runs", "mirror", run.id, "--to", url], standalone_mode=False)
        assert there.info.run_id in told.output
        assert len(client.get_metric_history(there.info.run_id, "loss")) == 1500
    finally:
        os.killpg(server.pid, 9)
        server.wait()
        log.close()


def test_a_mirror_that_is_away_costs_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "mlflow.entities", None)
    monkeypatch.setenv("TALLY_MLFLOW", "http://user:secret@127.0.0.1:9")
    with tally.training.run("pets") as run:
        run.log("loss", 1.0)
    record = RunStore.open().get(run.id)
    assert record.state == "finished"
    assert f"run {run.id} is not mirrored: a mirror in MLflow needs mlflow" in caplog.text
    with pytest.raises(RunError, match="needs mlflow, which is not installed"):
        mirror(RunStore.open(), record, "http://127.0.0.1:9")
