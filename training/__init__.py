"""The commands: installed as `ddpm_hf.scripts`."""
