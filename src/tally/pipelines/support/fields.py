"""Fields of Argo: what is done here, what is passed over, and what is refused, and why.

A field that says how pods are placed or kept means nothing here, and is passed over with a note. One that would change
what a step does, and is not done, is refused.
"""

from __future__ import annotations

from typing import NamedTuple


class Fields(NamedTuple):
    """Those of one object. What is in neither is refused."""

    done: frozenset[str]
    passed: frozenset[str] = frozenset()


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PLACED = _words(
    "affinity automountServiceAccountToken dnsConfig dnsPolicy executor hostAliases hostNetwork imagePullSecrets "
    "metadata metrics nodeSelector podMetadata podPriorityClassName podResources podSpecPatch priority schedulerName "
    "securityContext serviceAccountName tolerations"
)
SPEC = Fields(
    done=_words(
        "activeDeadlineSeconds arguments entrypoint hooks onExit parallelism retryStrategy synchronization "
        "templateDefaults templates volumeClaimTemplates volumes workflowMetadata workflowTemplateRef"
    ),
    passed=_PLACED
    | _words(
        "archiveLogs artifactGC artifactRepositoryRef podDisruptionBudget podGC ttlStrategy volumeClaimGC",
    ),
)
TEMPLATE = Fields(
    done=_words(
        "activeDeadlineSeconds annotations container daemon dag failFast http inputs memoize name outputs parallelism "
        "resource retryStrategy script sidecars steps suspend synchronization timeout volumes"
    ),
    passed=_PLACED | {"archiveLocation"},
)
CONTAINER = Fields(
    done=_words("args command env envFrom image name source volumeMounts workingDir"),
    passed=_words(
        "imagePullPolicy livenessProbe ports readinessProbe resources securityContext startupProbe stdin stdinOnce "
        "terminationMessagePath terminationMessagePolicy tty"
    ),
)
WHY = {
    "containerSet": "containers of one pod with an order among them are not run here",
    "data": "it lists objects of a store by a pod of Argo's own",
    "plugin": "it needs a plugin of Argo's executor",
    "initContainers": "containers before the main one are not run here",
    "suspend": "a workflow that is submitted suspended is not run here",
    "shutdown": "a workflow that is shut down is not run here",
    "resourceClaims": "it asks for devices of a cluster",
    "lifecycle": "hooks of containers are not run here",
}
"""Why some that are refused are."""

STORES = {
    "artifactory": "an Artifactory server",
    "azure": "an Azure Blob Storage account",
    "gcs": "Google Cloud Storage",
    "git": "a git repository",
    "hdfs": "an HDFS cluster",
    "oss": "Alibaba's object storage",
    "plugin": "an artifact plugin of the cluster",
}
"""Where artifacts cannot be, and what that takes."""
LOCATIONS = (*STORES, "http", "raw", "s3")
S3 = _words("endpoint bucket key region insecure accessKeySecret secretKeySecret sessionTokenSecret")
GLOBALS = _words(
    "name namespace uid mainEntrypoint serviceAccountName priority creationTimestamp duration status failures "
    "scheduledTime parameters labels annotations outputs"
)
"""What ``workflow`` has."""
