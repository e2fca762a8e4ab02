"""Sampling: the pipeline, classifier-free guidance, image editing and DDIM inversion."""
