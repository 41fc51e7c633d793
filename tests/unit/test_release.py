"""What stands around the package: forms, licences, and what the index of packages shows."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from tests.examples import script

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return script("../scripts/release.py")


def test_links_of_the_readme_lead_somewhere_from_the_index_of_packages(release: ModuleType) -> None:
    text = """[quick](docs/quickstart.md#ask-it) ![moving](docs/images/demo.gif) [web](https://a.org) [here](#words)
[![jobs](docs/images/server-jobs.png)](docs/how-to/server.md) <img width="3" src="docs/images/demo.gif">"""
    base = f"https://example.org/tally/{{}}/v{release.VERSION}"
    blob, raw = base.format("blob"), base.format("raw")
    assert release.absolute(text, "https://example.org/tally/") == (
        f"[quick]({blob}/docs/quickstart.md#ask-it) ![moving]({raw}/docs/images/demo.gif) "
        "[web](https://a.org) [here](#words)\n"
        f"[![jobs]({raw}/docs/images/server-jobs.png)]({blob}/docs/how-to/server.md) "
        f'<img width="3" src="{raw}/docs/images/demo.gif">'
    )
    readme = release.absolute((REPOSITORY / "README.md").read_text("utf-8"), "https://example.org/tally")
    assert [link for link in LINK.findall(readme) if not link.startswith(("https://", "#"))] == []


def test_what_a_release_needs(release: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    project = {"version": "99.0", "dependencies": ["numpy>=2", "Zebra[stripes]>=1"], "optional-dependencies": {}}
    monkeypatch.setattr(release, "run", lambda *command, **options: " M README.md")
    monkeypatch.setattr(release, "VERSION", "99.0")
    monkeypatch.setattr(release, "PROJECT", project)
    assert release.problems() == [
        "the tree has changes that are not committed",
        "CHANGELOG.md has no heading '## 99.0 (YEAR-MONTH-DAY)'",
        "docs/reference/licences.md lacks zebra: run scripts/licences.py",
        'pyproject.toml does not say where the repository is: [project.urls] Repository = "https://..."',
    ]


@pytest.mark.parametrize("form", ["bug", "idea"])
def test_forms_of_issues_have_what_the_host_needs(form: str) -> None:
    read = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text("utf-8"))
    assert read.keys() == {"name", "description", "labels", "body"}
    fields = [field["id"] for field in read["body"]]
    assert len(set(fields)) == len(fields) > 0
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in read["body"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_of_the_project_pages_lead_somewhere(page: str) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall((REPOSITORY / page).read_text("utf-8"))]
    assert targets
    assert [target for target in targets if not (REPOSITORY / target).exists()] == []
