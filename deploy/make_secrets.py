"""Make the secrets that compose.yaml refers to, in the folder ``secrets`` beside it. What is there already stays.

With ``--kubernetes``, print them as the Secrets of the overlay dev-test, for ``kubectl apply -n NAMESPACE -f -``.
"""

import json
import secrets
import sys
from pathlib import Path

FOLDER = Path(__file__).with_name("secrets")


def main() -> None:
    FOLDER.mkdir(mode=0o700, exist_ok=True)  # nobody else comes this far; in containers, other users read the files
    password = _kept("database-password", secrets.token_hex(24))
    _kept("database-url", f"postgresql://tally:{password}@postgres/tally")
    admin = _kept("admin-key", f"tly_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}")
    token = _kept("ray-token", secrets.token_hex(32))
    key = _kept("s3-key", secrets.token_hex(24))
    tally = {"name": "tally", "credentials": [{"accessKey": "tally", "secretKey": key}], "actions": ["Admin"]}
    s3 = _kept("s3.json", json.dumps({"identities": [tally]}))
    if "--kubernetes" in sys.argv:
        database = f"postgresql://tally:{password}@tally-postgres/tally"
        for name, entries in {
            "tally": {"TALLY_DATABASE": database, "POSTGRES_PASSWORD": password, "TALLY_ADMIN_KEY": admin},
            "tally-ray": {"auth_token": token},
            "tally-objects": {"s3.json": s3},
            "tally-storage": {"AWS_ACCESS_KEY_ID": "tally", "AWS_SECRET_ACCESS_KEY": key},
        }.items():
            print("---")
            found = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": entries}
            print(json.dumps(found))
        return
    print(f"The secrets are in {FOLDER}")


def _kept(name: str, content: str) -> str:
    file = FOLDER / name
    if not file.exists():
        new = file.with_suffix(".new")  # renamed when it is whole: this may be killed at any time
        new.write_text(content, "utf-8")
        new.chmod(0o644)
        new.replace(file)
    kept = file.read_text("utf-8").strip()  # editors end a file with a line break
    if not kept:
        sys.exit(f"{file} is empty: remove it, and a new one is made")
    return kept


if __name__ == "__main__":
    main()
