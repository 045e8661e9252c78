"""Megatron directories: every dialect of TP x PP rank files, and Megatron-LM's torch_dist."""
