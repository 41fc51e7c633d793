"""Endpoints put somewhere else: a target renders what it takes, tells the difference to what is there, applies it."""
