"""What one step of a pipeline is made of: its files, its process, its outputs."""
