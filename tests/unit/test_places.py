"""Who may have a server run what: code comes from where its owner put it, or from an admin."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from tally.errors import RefusedError
from tally.server.auth.roles import Principal, Role
from tally.server.places import check_code


def allowed(role: Role, model: str, *, artifacts: str | None = None, trust: bool = False) -> bool:
    try:
        check_code(Principal("ada", role, "1"), model, artifacts=artifacts, trust=trust)
    except RefusedError:
        return False
    return True


@pytest.mark.parametrize(
    "model",
    [
        "s3://anybody/package", "s3://anybody/package/", "s3://anybody/package/tally.yaml", "s3://anybody/words.py",
        "s3://anybody/model.pkl", "s3://anybody/MODEL.JOBLIB", "s3://anybody/run/MLmodel", "S3://anybody/package",
        "https://example.com/model.pickle#sha256=0", "https://example.com/model?file=model.onnx", "gs://anybody",
        "az://anybody/{Device}", "s3://anybody/model.onnx/",
    ],
)  # fmt: skip
def test_an_operator_brings_no_code_from_elsewhere(model: str) -> None:
    assert not allowed("operator", model)
    assert allowed("admin", model, trust=True)


@pytest.mark.parametrize(
    "model",
    [
        "s3://bucket/model.onnx", "https://example.com/model.onnx#sha256=0", "s3://bucket/{Device}.skops",
        "models:/net@champion", "/root/package", "/root/words.py", "models:/{meta:model}",
    ],
)  # fmt: skip
def test_an_operator_names_data_and_what_the_owner_put_there(model: str) -> None:
    assert allowed("operator", model)
    assert allowed("operator", model, artifacts="/root/weights")
    assert not allowed("operator", model, artifacts="s3://anybody/weights")
    assert allowed("operator", model, trust=True) is ("://" not in model)
