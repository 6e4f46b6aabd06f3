"""The samplers, one file per kind; `diffusion.samplers` has them by name, with the levels they visit."""
