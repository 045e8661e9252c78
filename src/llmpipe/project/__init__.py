"""A project's folder: what the workflow's rules look up in its config files."""
