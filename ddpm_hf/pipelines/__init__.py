"""Sampling: the pipeline, guidance, editing and inversion."""
