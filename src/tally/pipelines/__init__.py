"""Pipelines: Argo Workflow files, executed on this machine."""
