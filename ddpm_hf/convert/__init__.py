"""Checkpoints of other repositories as pipelines: `ddpm_hf.convert.pipeline.convert`."""
