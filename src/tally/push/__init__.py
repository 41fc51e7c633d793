"""Results by push: committed rows go to a web address, or into a table of a database."""
