"""The three networks of Stable Diffusion. Plain tensors in, plain tensors out."""
