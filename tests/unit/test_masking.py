"""No secret is shown, however it is spelled; what is no secret stays as it is."""

from __future__ import annotations

import random

import pytest

from tally.errors import SpecError, TallyError, error_line
from tally.masking import HIDDEN, mask

S = "s3cr3tV4lue"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{S}@host/x",
        f"https://{S}@host/x",
        f"HTTPS://user:{S}@host:8443/x",
        f"postgresql+psycopg://me:{S}@db/tally",
        f"postgres://me:{S}@db/tally",
        f"postgresql://me:a/{S}@db/tally",
        f"postgresql://me:12/{S}@db/tally",
        f"postgresql://me:a@{S}@db/tally",
        f"postgresql://me:a#{S}@db/tally",
        f"postgresql://me:a?{S}@db/tally",
        f"postgresql://me:a {S}@db/tally",
        f"postgresql://me:a'{S}@db/tally",
        f"postgresql://me:{S}%40db/tally",
        f"postgresql://me:{S}",
        f"postgresql%3A%2F%2Fme%3A{S}%40db%2Ftally",
        f"postgresql://db/tally?user=me&password={S}",
        f"postgresql://db/tally?pass%77ord={S}",
        f"postgresql://db/tally?sslpassword={S}&sslmode=require",
        f"cannot connect: host=db user=me password={S} dbname=tally",
        f"cannot connect: host=db password='a {S}' dbname=tally",
        f"s3://AKIA:{S}@bucket/x",
        f"s3://AKIA:ab/cd+{S}@bucket/x",
        f"az://container/x?sv=2024&sig={S}",
        f"https://host/m.onnx?X-Amz-Credential=AKIA%2F2026&X-Amz-Signature={S}#sha256={'0' * 64}",
        f"https://host/m.onnx?{S}",
        f"https://host/m.onnx#access_token={S}",
        f"GET https://host/m.onnx?sig={S} failed: 403",
        f"redis://:{S}@host/0",
        f"amqp://guest:{S}@host//",
        f"Authorization: Bearer {S}",
        f"Authorization: Basic {S}==",
        f"{{'authorization': 'Bearer {S}'}}",
        f"{{'X-Amz-Security-Token': '{S}', 'date': 'x'}}",
        f"x-api-key: {S}",
        f"Cookie: session={S}",
        f'{{"password": "{S}"}}',
        f"AWS_SECRET_ACCESS_KEY={S}",
        f"AccountKey={S}==;EndpointSuffix=core.windows.net",
        f"sv=2024&sig={S}",
        f"TALLY_WEBHOOK_SECRET=whsec_{S}",
        f"the key whsec_{S} is bad",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    assert S not in mask(text)
    assert HIDDEN in mask(text)
    assert mask(mask(text)) == mask(text)
    assert S not in str(TallyError(text))
    assert S not in str(SpecError([text, "other"], hint=None))
    assert S not in error_line(ValueError(text))


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/icons/a@2x.png",
        "s3://bucket/photo?.jpg",
        "s3://bucket/a#b",
        "abfss://c@account.dfs.core.windows.net/x@2",
        "postgresql://me@db:5432/tally?sslmode=require",
        "sqlite:////home/me/tally.db",
        "amqp://me@host/vhost/queue",
        "redis://me@host/0/queue?kind=list&group=tally",
        "sqs://eu-west-1/images?lock=60",
        "azure-queue://account/images?lock=60&encoding=plain",
        "servicebus://namespace/topic/subscription?lock=60",
        "kafka://one:9092,two:9092,three:9092/images?lock=30",
        "kafkas://me@one:9093,two:9093/images?group=tally",
        "https://host:8080: connection refused",
        "http://[::1]:8265/x",
        "https://host/m.onnx#sha256=" + "0" * 64,
        "models:/name@alias",
        "tokens: 3 of 4",
        "no password: set TALLY_DATABASE",
        "ValueError: 'a' = 3; key=4",
        "a b.csv?x",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert mask(text) == text


@pytest.mark.parametrize("scheme", ["postgresql", "https", "s3", "amqp"])
def test_no_password_shows(scheme: str) -> None:
    """Whatever is in it, unquoted."""
    choice = random.Random(7)
    letters = [chr(code) for code in range(33, 0x250) if chr(code).isprintable() and chr(code) not in "'\"<>|`\xa0\xad"]
    for _ in range(2000):
        password = "".join(choice.choices(letters, k=choice.randint(1, 12)))
        assert S not in mask(f"cannot open {scheme}://me:{password}{S}@host/place: refused"), password
