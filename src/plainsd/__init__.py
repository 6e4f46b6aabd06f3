"""plainsd: Stable Diffusion, written plainly."""
