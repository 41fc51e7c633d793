"""What of a workflow runs on this machine, what needs a cluster, and why: said before anything starts."""
