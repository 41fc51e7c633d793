"""Endpoints on a Kubernetes cluster."""
