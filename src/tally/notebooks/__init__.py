"""Tally in a notebook: progress while a job runs, jobs and figures to look at, and worked notebooks to begin with."""
