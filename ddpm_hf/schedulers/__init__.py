"""The DDPM scheduler, and diffusers' schedulers by name."""
