"""The mathematics: schedules, the chain, losses and likelihood. Pure PyTorch, no diffusers."""
