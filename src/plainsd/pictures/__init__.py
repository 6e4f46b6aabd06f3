"""From prompts and a model to latents and pictures (part III): settings, conditioning, guidance, the loop, images.

What every task shares. The tasks themselves are in generate.py.
"""
