"""Corpus files as blocks of rows: one module a format; `llmpipe.data.sources` says which reads which file."""
