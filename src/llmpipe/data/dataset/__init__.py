"""Datasets on disk: PREFIX.bin, PREFIX.idx, the roles of their tokens, and the manifest."""
