"""A stand-in for a Kubernetes API server, on loopback: what deploying asks of one, and nothing else.

It keeps objects, applies manifests as server-side apply does (each manager's fields are its own: what it no longer
mentions goes, what another has set is a conflict), fills in defaults, answers dry runs without keeping anything, and
refuses as a real one does. It runs no pods: a test says what becomes of them.
"""

from __future__ import annotations

import copy
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]

CORE = (
    "services", "pods", "secrets", "resourcequotas", "nodes", "namespaces", "configmaps", "serviceaccounts",
    "persistentvolumeclaims", "persistentvolumes",
)  # fmt: skip
GLOBAL = ("nodes", "namespaces", "persistentvolumes", "storageclasses", "customresourcedefinitions")
GROUPS = {
    "apps/v1": ("deployments", "replicasets", "statefulsets"),
    "storage.k8s.io/v1": ("storageclasses",),
    "rbac.authorization.k8s.io/v1": ("roles", "rolebindings"),
    "apiextensions.k8s.io/v1": ("customresourcedefinitions",),
    "batch/v1": ("jobs",),
    "networking.k8s.io/v1": ("networkpolicies", "ingresses"),
    "policy/v1": ("poddisruptionbudgets",),
    "autoscaling/v2": ("horizontalpodautoscalers",),
    "gateway.networking.k8s.io/v1": ("httproutes", "gateways"),
}


class Refusal(Exception):
    def __init__(self, code: int, reason: str, message: str, causes: list[Object] | None = None) -> None:
        super().__init__(message)
        self.code, self.reason, self.causes = code, reason, causes or []


class ApiServer:
    """namespace: the one that there is. deny: (method, plural) that are forbidden. groups: the API groups it knows.

    busy: so many requests are answered 503, or not at all. each_look: called before each GET of a Deployment: a test
    moves a rollout on with it; on_look: the same for each GET of another kind. logs: of pods. refuse: (method, plural)
    to the codes of the next answers, as of a server that has too much to do.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.groups: dict[str, tuple[str, ...]] = dict(GROUPS)
        self.deny: set[tuple[str, str]] = set()
        self.requests: list[tuple[str, str]] = []
        self.each_look: Iterator[Callable[[], None]] = iter(())
        self.on_look: dict[str, Callable[[], None]] = {}
        self.logs: dict[str, str] = {}
        self.busy = 0
        self.refuse: dict[tuple[str, str], list[int]] = {}
        self._lock = threading.RLock()
        self._applied: dict[str, dict[str, Object]] = {}
        self._objects: dict[str, Object] = {}
        self.put("namespaces", {"kind": "Namespace", "metadata": {"name": namespace}})

    # -- what tests do ------------------------------------------------------------------------------------

    def path(self, plural: str, name: str = "") -> str:
        group = next((group for group, known in self.groups.items() if plural in known), None)
        base = "/api/v1" if group is None else f"/apis/{group}"
        inner = "" if plural in GLOBAL else f"/namespaces/{self.namespace}"
        return f"{base}{inner}/{plural}" + (f"/{name}" if name else "")

    def put(self, plural: str, found: Object) -> Object:
        """Have an object there, as if others had made it."""
        with self._lock:
            found = {**found, "metadata": {"uid": str(uuid.uuid4()), "resourceVersion": "1", **found["metadata"]}}
            self._objects[self.path(plural, found["metadata"]["name"])] = found
            return found

    def teach(self, group: str, version: str, kind: str, plural: str, fields: dict[str, Object]) -> None:
        """Have it know objects of another kind. fields: of spec."""
        key = f"{group}/{version}"
        self.groups[key] = (*self.groups.get(key, ()), plural)
        schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
        one = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
        names = {"kind": kind, "plural": plural}
        spec = {"group": group, "names": names, "scope": "Namespaced", "versions": [one]}
        self.put("customresourcedefinitions", {"metadata": {"name": f"{plural}.{group}"}, "spec": spec})

    def get(self, plural: str, name: str) -> Object | None:
        with self._lock:
            return copy.deepcopy(self._objects.get(self.path(plural, name)))

    def remove(self, plural: str, name: str) -> None:
        with self._lock:
            self._objects.pop(self.path(plural, name), None)

    def names(self, plural: str) -> list[str]:
        prefix = self.path(plural) + "/"
        return sorted(path.removeprefix(prefix) for path in self._objects if path.startswith(prefix))

    def edit(self, plural: str, name: str, manager: str, change: Object) -> None:
        """Apply some fields as another manager."""
        with self._lock:
            path = self.path(plural, name)
            live = self._objects[path]
            body = {"apiVersion": live["apiVersion"], "kind": live["kind"], "metadata": {"name": name}, **change}
            self._apply(path, manager, body, force=True, dry_run=False)

    def set_status(self, name: str, *, plural: str = "deployments", **status: Any) -> None:
        """Set the status of a Deployment; what is not given is as of a controller that has seen it."""
        with self._lock:
            live = self._objects[self.path(plural, name)]
            live["status"] = {"observedGeneration": live["metadata"]["generation"], **status}

    def complete(self, name: str) -> None:
        """Have a Deployment's replicas all there."""
        count = self._objects[self.path("deployments", name)]["spec"]["replicas"]
        self.set_status(name, replicas=count, updatedReplicas=count, readyReplicas=count, availableReplicas=count)

    def add_pod(self, endpoint: str, name: str, status: Object, *, hash_: str = "new") -> None:
        live = self._objects[self.path("deployments", endpoint)]
        labels = {**live["spec"]["template"]["metadata"]["labels"], "pod-template-hash": hash_}
        self.put("pods", {"metadata": {"name": name, "labels": labels}, "status": status})

    def write_kubeconfig(self, path: Path, url: str, *, context: str = "test", token: str = "secret-token") -> Path:
        found = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": context,
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": context, "context": {"cluster": "c", "user": "u", "namespace": self.namespace}}],
        }
        path.write_text(yaml.safe_dump(found))
        return path

    # -- requests -----------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, str, bytes]:
        parts = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        path = parts.path
        with self._lock:
            self.requests.append((method, target))
            try:
                if headers.get("Authorization") != "Bearer secret-token":
                    raise Refusal(401, "Unauthorized", "Unauthorized")
                if self.busy > 0:
                    raise Refusal(503, "ServiceUnavailable", "the server is shutting down")
                return self._do(method, path, query, headers, body)
            except Refusal as refusal:
                status = {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "status": "Failure",
                    "message": str(refusal),
                    "reason": refusal.reason,
                    "code": refusal.code,
                    "details": {"causes": refusal.causes},
                }
                return refusal.code, "application/json", json.dumps(status).encode()

    def _do(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> tuple[int, str, bytes]:
        words = path.strip("/").split("/")
        group, rest = (None, words[2:]) if words[0] == "api" else ("/".join(words[1:3]), words[3:])
        if group is not None and group not in self.groups:
            return 404, "text/plain", b"404 page not found\n"
        named = rest[0] == "namespaces" and len(rest) > 2
        plural, names = (rest[2], rest[3:]) if named else (rest[0], rest[1:])
        if plural not in (CORE if group is None else self.groups[group]):
            return 404, "text/plain", b"404 page not found\n"
        if (method, plural) in self.deny:
            raise Refusal(403, "Forbidden", f'{plural} is forbidden: User "u" cannot {method} resource "{plural}"')
        if codes := self.refuse.get((method, plural)):
            return codes.pop(0), "text/plain", b"Too many requests, please try again later.\n"
        if named and self.get("namespaces", rest[1]) is None and method != "GET":
            raise Refusal(404, "NotFound", f'namespaces "{rest[1]}" not found')
        if names[1:] == ["log"]:
            return 200, "text/plain", self.logs.get(names[0], "").encode()
        if method == "GET" and not names:
            return _json(self._list(path, query.get("labelSelector", "")))
        if plural == "deployments" and method == "GET":
            next(self.each_look, lambda: None)()
        if method == "GET":
            self.on_look.get(plural, lambda: None)()
        if method == "PATCH":
            assert headers["Content-Type"] == "application/apply-patch+yaml"
            force, dry_run = query.get("force") == "true", query.get("dryRun") == "All"
            if plural == "jobs" and (there := self._objects.get(path)) is not None:
                wanted, has = (each["spec"]["template"]["spec"] for each in (json.loads(body), there))
                if _merged(has, wanted) != has:
                    raise Refusal(
                        422, "Invalid", f'Job.batch "{names[0]}" is invalid: spec.template: field is immutable'
                    )
            return _json(self._apply(path, query["fieldManager"], json.loads(body), force=force, dry_run=dry_run))
        if method == "POST":
            made = json.loads(body)
            name = made["metadata"]["name"]
            if f"{path}/{name}" in self._objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists')
            return _json(
                self._apply(f"{path}/{name}", query.get("fieldManager", "post"), made, force=True, dry_run=False)
            )
        if path not in self._objects:
            raise Refusal(404, "NotFound", f'{plural} "{names[0]}" not found')
        if method == "DELETE":
            del self._objects[path]
            self._applied.pop(path, None)
            return _json({"kind": "Status", "status": "Success"})
        return _json(self._objects[path])

    def _list(self, path: str, selector: str) -> Object:
        wanted = dict(each.split("=", 1) for each in selector.split(",") if each)
        items = [
            found
            for where, found in self._objects.items()
            if where.rpartition("/")[0] == path and wanted.items() <= found["metadata"].get("labels", {}).items()
        ]
        return {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}

    def _apply(self, path: str, manager: str, manifest: Object, *, force: bool, dry_run: bool) -> Object:
        managers = copy.deepcopy(self._applied.get(path, {}))
        if path in self._objects and path not in self._applied:
            managers["others"] = {
                key: self._objects[path][key] for key in ("spec", "data") if self._objects[path].get(key) is not None
            }
        clashes: list[Object] = []
        for other, fields in managers.items():
            if other == manager:
                continue
            for where, value in _leaves(manifest):
                theirs = _at(fields, where)
                if theirs is not _NOTHING and theirs != value and where[0] != "metadata":
                    field = "." + ".".join(where)
                    clashes.append(
                        {"reason": "FieldManagerConflict", "field": field, "message": f'conflict with "{other}"'}
                    )
                    _drop(fields, where)
        if clashes and not force:
            raise Refusal(409, "Conflict", f"Apply failed with {len(clashes)} conflict", clashes)
        managers[manager] = manifest
        live: Object = {}
        for fields in managers.values():
            live = _merged(live, fields)
        _set_defaults(live)
        before = self._objects.get(path)
        metadata = live.setdefault("metadata", {})
        metadata["uid"] = before["metadata"]["uid"] if before else str(uuid.uuid4())
        metadata["creationTimestamp"] = "2026-11-29T00:00:00Z"
        metadata["managedFields"] = [{"manager": each, "operation": "Apply"} for each in managers]
        generation = before["metadata"].get("generation", 1) if before else 1
        changed = before is not None and before.get("spec") != live.get("spec")
        metadata["generation"] = generation + changed
        metadata["resourceVersion"] = str(int(before["metadata"]["resourceVersion"]) + 1 if before else 1)
        if before and "status" in before:
            live["status"] = before["status"]
        if not dry_run:
            self._applied[path], self._objects[path] = managers, live
        return live


_NOTHING = object()


def _json(found: Object) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps(found).encode()


def _set_defaults(live: Object) -> None:
    """Some of those that a real server fills in: they are no difference."""
    if live.get("kind") == "Deployment":
        live["spec"].setdefault("replicas", 1)
        for each in live["spec"]["template"]["spec"]["containers"]:
            each.setdefault("imagePullPolicy", "IfNotPresent")
    if live.get("kind") == "Service":
        live["spec"].setdefault("sessionAffinity", "None")


def _merged(one: Any, other: Any) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _merged(one.get(key), other[key]) if key in other else one[key] for key in [*one, *other]}
    if (
        isinstance(one, list)
        and isinstance(other, list)
        and all(isinstance(each, dict) and "name" in each for each in one)
    ):
        found = {each["name"]: each for each in one}
        for each in other:
            found[each["name"]] = _merged(found.get(each["name"]), each)
        return list(found.values())
    return copy.deepcopy(other)


def _leaves(found: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(found, dict) and found:
        for key, value in found.items():
            yield from _leaves(value, (*where, key))
    else:
        yield where, found


def _at(found: Any, where: tuple[str, ...]) -> Any:
    for key in where:
        if not isinstance(found, dict) or key not in found:
            return _NOTHING
        found = found[key]
    return found


def _drop(found: Object, where: tuple[str, ...]) -> None:
    for key in where[:-1]:
        found = found[key]
    del found[where[-1]]


@contextmanager
def running(namespace: str = "ml") -> Iterator[tuple[ApiServer, str]]:
    """A server and its URL, until the block ends."""
    server = ApiServer(namespace)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # one segment an answer: in two, each waits for an acknowledgement

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.busy = max(0, server.busy - 1)
            if server.busy % 2:
                self.close_connection = True
                return
            code, kind, answer = server.answer(self.command, self.path, self.headers, body)
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_DELETE = _serve

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            listening.shutdown()
            thread.join()
