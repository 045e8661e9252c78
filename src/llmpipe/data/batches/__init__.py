"""Datasets to the rows that the trainer reads: sampled, packed, held out."""
