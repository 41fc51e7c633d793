"""What of a set of manifests does not fit together: what no schema says, and an API server takes without a word."""
