"""Rows of databases: of a table, or of any query."""
