"""The samplers, a file a kind; `diffusion.samplers` has them by name, with the levels they visit."""
