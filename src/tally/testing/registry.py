"""What every database and every place of content under the model registry must do.

Inherit :class:`RegistryContract` (names, versions, aliases) or :class:`ContentContract` in a test module, and override
the fixtures ``engine`` and, for another place than a folder, ``root``.
"""

from __future__ import annotations

import getpass
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from tally.errors import ModelChangedError, ModelError, ModelNotFoundError, SpecError
from tally.models.load import load
from tally.models.registry import Registry
from tally.models.resolve import resolve
from tally.scorers.base import Scorer
from tally.storage import open_store

SCRIPT = "def init():\n    pass\n\n\ndef run(mini_batch):\n    return [{number}] * len(mini_batch)\n"


class Nothing(Scorer):
    """A scorer that exists only as an object."""


class _Contract:
    @pytest.fixture
    def engine(self) -> sa.Engine:
        """An empty database with the registry's tables."""
        raise NotImplementedError("override the fixture 'engine'")

    @pytest.fixture
    def root(self, tmp_path: Path) -> str | Path:
        """An empty place for content: a folder, or a bucket's URL."""
        return tmp_path / "models"

    @pytest.fixture
    def registry(self, engine: sa.Engine, root: str | Path) -> Registry:
        return Registry(engine, root)

    def script(self, folder: Path, number: int) -> Path:
        """A model: another one for each number."""
        path = folder / f"script{number}" / "score.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SCRIPT.format(number=number))
        return path

    def kept(self, registry: Registry) -> list[str]:
        """What the registry keeps: the folders' names."""
        names = (entry.name for entry in open_store(registry.root).list("sha256"))
        return sorted({name.split("/")[1] for name in names})


class RegistryContract(_Contract):
    """Names, versions and aliases."""

    def test_versions_count_up(self, registry: Registry, tmp_path: Path) -> None:
        first = registry.add("faces", resolve(self.script(tmp_path, 1)), metadata={"metrics": {"ap": 0.5}})
        second = registry.add("faces", resolve(self.script(tmp_path, 2)))
        other = registry.add("dogs", resolve(self.script(tmp_path, 3)))
        assert [str(first), str(second), str(other)] == ["models:/faces/1", "models:/faces/2", "models:/dogs/1"]
        assert [str(each) for each in registry.list()] == [str(other), str(first), str(second)]
        shown = registry.show("faces")
        assert [each.version for each in shown.versions] == [1, 2]
        assert shown.versions[0].metadata == {"metrics": {"ap": 0.5}}
        assert shown.versions[0].created_at <= shown.versions[1].created_at
        assert first.bytes > 0
        assert first.kind == "script"

    def test_names_are_looked_up(self, registry: Registry, tmp_path: Path) -> None:
        for number in (1, 2):
            registry.add("faces", resolve(self.script(tmp_path, number)))
        registry.alias("faces", "production", 1)
        assert registry.get("models:/faces").version == 2
        assert registry.get("models:/faces/1").version == 1
        assert registry.get("models:/faces@production").version == 1
        for uri, message in {
            "models:/face": "no model 'face' in the registry; did you mean 'faces'?",
            "models:/faces/3": "has no version 3\n  It has 1, 2.",
            "models:/faces/production": "An alias is written faces@production",
            "models:/faces@prodution": "no alias 'prodution'; did you mean 'production'?",
        }.items():
            with pytest.raises(ModelNotFoundError) as caught:
                registry.get(uri)
            assert message in str(caught.value)
        with pytest.raises(SpecError, match="Write models:/name"):
            registry.get("models:faces")

    def test_aliases_move_and_roll_back(self, registry: Registry, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            registry.add("faces", resolve(self.script(tmp_path, number)), alias="production")
        assert registry.rollback("faces", "production").version == 2
        assert registry.rollback("faces", "production").version == 1
        with pytest.raises(ModelError, match="no earlier version to go back to"):
            registry.rollback("faces", "production")
        registry.alias("faces", "production", 3)
        registry.alias("faces", "production", 3)
        assert registry.rollback("faces", "production").version == 1
        history = [(each.version, each.action) for each in registry.show("faces").history]
        assert history == [
            (1, "set"),
            (2, "set"),
            (3, "set"),
            (2, "rollback"),
            (1, "rollback"),
            (3, "set"),
            (3, "set"),
            (1, "rollback"),
        ]
        assert registry.get("models:/faces@production").version == 1
        with pytest.raises(ModelNotFoundError):
            registry.rollback("faces", "staging")
        with pytest.raises(ModelNotFoundError):
            registry.alias("faces", "production", 9)

    def test_an_alias_is_removed_and_the_history_says_who_did_what(self, registry: Registry, tmp_path: Path) -> None:
        registry.add("faces", resolve(self.script(tmp_path, 1)), alias="production", who="ana")
        registry.add("faces", resolve(self.script(tmp_path, 2)))
        registry.alias("faces", "production", 2, who="ben")
        assert registry.unalias("faces", "production", who="eve").version == 2
        with pytest.raises(ModelNotFoundError, match="no alias 'production'"):
            registry.get("models:/faces@production")
        for change in (registry.unalias, registry.rollback):
            with pytest.raises(ModelNotFoundError, match="no alias 'production'"):
                change("faces", "production")
        registry.alias("faces", "production", 1)
        with pytest.raises(ModelError, match="no earlier version to go back to"):
            registry.rollback("faces", "production")
        assert [(each.version, each.action, each.who) for each in registry.show("faces").history] == [
            (1, "set", "ana"),
            (2, "set", "ben"),
            (2, "remove", "eve"),
            (1, "set", getpass.getuser()),
        ]

    def test_rollback_passes_over_removed_versions(self, registry: Registry, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            registry.add("faces", resolve(self.script(tmp_path, number)), alias="production")
        registry.remove("faces", 2)
        assert registry.rollback("faces", "production").version == 1
        with pytest.raises(ModelError):
            registry.rollback("faces", "production")

    def test_names_and_models_that_are_refused(self, registry: Registry, tmp_path: Path) -> None:
        path = self.script(tmp_path, 1)
        for name in ("", "Faces", "a/b", "a@b", "-a", "ä", "a" * 129):
            with pytest.raises(SpecError, match=r"the name .* is not allowed"):
                registry.add(name, resolve(path))
        for alias in ("Production", "a/b", "3"):
            with pytest.raises(SpecError, match="the alias"):
                registry.add("faces", resolve(path), alias=alias)
        with pytest.raises(SpecError, match="Nothing is a Python object, which a registry cannot keep"):
            registry.add("faces", resolve(Nothing()))
        assert registry.list() == []


class ContentContract(_Contract):
    """What versions hold."""

    def test_the_same_content_is_added_once(self, registry: Registry, tmp_path: Path) -> None:
        path = self.script(tmp_path, 1)
        first, again = registry.add("faces", resolve(path)), registry.add("faces", resolve(path), alias="staging")
        assert (first.existed, again.existed) == (False, True)
        assert (again.version, again.aliases) == (1, ("staging",))
        other = registry.add("dogs", resolve(path))
        assert not other.existed
        assert other.location == first.location
        assert [f"sha256:{each}" for each in self.kept(registry)] == [first.hash]

    def test_content_stands_on_its_own(self, registry: Registry, tmp_path: Path) -> None:
        path = self.script(tmp_path, 7)
        weights = tmp_path / "weights"
        weights.mkdir()
        (weights / "w.bin").write_bytes(b"w")
        ref = resolve(path, artifacts=weights, settings={"batch_size": 5})
        added = registry.add("faces", ref)
        path.unlink()
        (weights / "w.bin").unlink()
        kept = resolve(registry.fetch(added))
        assert kept.hash == added.hash
        scorer = load(kept, "cpu")
        assert scorer.batch_size == 5
        assert scorer.score(["a", "b"]) == [{"prediction": 7}] * 2
        assert (kept.location / kept.artifacts / "w.bin").read_bytes() == b"w"
        assert registry.add("copies", kept).hash == added.hash

    def test_removing(self, registry: Registry, tmp_path: Path) -> None:
        first = registry.add("faces", resolve(self.script(tmp_path, 1)))
        second = registry.add("faces", resolve(self.script(tmp_path, 2)), alias="production")
        copy = registry.add("dogs", resolve(self.script(tmp_path, 1)))
        with pytest.raises(ModelError, match="cannot be removed: faces@production points at it"):
            registry.remove("faces", 2)
        registry.remove("faces", 1)
        assert load(resolve(registry.fetch(copy)), "cpu").score(["a"]) == [{"prediction": 1}]
        registry.remove("dogs", 1)
        assert [f"sha256:{each}" for each in self.kept(registry)] == [second.hash]
        with pytest.raises(ModelNotFoundError):
            registry.fetch(first)
        with pytest.raises(ModelNotFoundError):
            registry.get("models:/faces/1")
        with pytest.raises(ModelNotFoundError):
            registry.remove("faces", 1)
        # Numbers are not used again, not even for what was there before.
        registry.alias("faces", "production", 2)
        assert registry.add("faces", resolve(self.script(tmp_path, 1))).version == 3

    def test_changed_content_is_noticed_and_mended(self, registry: Registry, tmp_path: Path) -> None:
        added = registry.add("faces", resolve(self.script(tmp_path, 1)))
        assert registry.verify("faces", 1) == registry.get("models:/faces/1")
        assert (registry.fetch(added) / "score.py").stat().st_mode & 0o222 == 0
        store, name = open_store(registry.root), f"sha256/{added.hash.removeprefix('sha256:')}/score.py"
        for damaged in (SCRIPT.format(number=6), ""):
            store.write(name, damaged.encode())
            with pytest.raises(ModelChangedError, match="models:/faces/1: the registry's copy was changed"):
                registry.verify("faces", 1)
            assert registry.add("faces", resolve(self.script(tmp_path, 1))).existed
            registry.verify("faces", 1)
        store.delete([name])
        with pytest.raises(ModelChangedError, match="the registry's copy was changed"):
            registry.fetch(added)

    def test_content_that_is_gone_is_not_found(self, registry: Registry, tmp_path: Path) -> None:
        added = registry.add("faces", resolve(self.script(tmp_path, 1)))
        open_store(registry.root).delete_tree(f"sha256/{added.hash.removeprefix('sha256:')}")
        for use in (lambda: registry.verify("faces", 1), lambda: registry.fetch(added)):
            with pytest.raises(ModelNotFoundError, match=r"Is TALLY_REGISTRY what it was .*: tally models add faces"):
                use()
        assert registry.add("faces", resolve(self.script(tmp_path, 1))).existed
        registry.verify("faces", 1)

    def test_adding_at_once(self, registry: Registry, tmp_path: Path) -> None:
        """Different content gets different numbers, the same content the same one."""
        refs = [resolve(self.script(tmp_path, number % 4)) for number in range(8)]
        start = threading.Barrier(len(refs))
        results: list[tuple[int, str]] = []
        errors: list[BaseException] = []

        def add(index: int) -> None:
            start.wait()
            try:
                added = registry.add("faces", refs[index], alias="newest")
                results.append((added.version, added.hash))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=add, args=(index,)) for index in range(len(refs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(results) == 8
        assert sorted(set(results)) == sorted((each.version, each.hash) for each in registry.list())
        assert [each.version for each in registry.list()] == [1, 2, 3, 4]
        assert len(registry.show("faces").history) == 8
        assert [f"sha256:{each}" for each in self.kept(registry)] == sorted({each.hash for each in registry.list()})
        for version in registry.list():
            registry.verify("faces", version.version)
