"""File formats that hold tensors: where each one's bytes lie, read and written, knowing nothing of models."""
