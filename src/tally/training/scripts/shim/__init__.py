"""Packages for the path of training scripts: names that they import, where the real ones are not installed."""
