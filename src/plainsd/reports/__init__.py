"""Reports on a model: what is in it, how its outputs compare with diffusers', how its speed compares with others'.

Other libraries are referenced here and nowhere else.
"""
