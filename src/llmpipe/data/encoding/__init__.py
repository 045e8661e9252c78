"""Rows of a corpus to tokens, for each kind of corpus."""
