"""Training data: captioned pictures, found, checked, cropped, and encoded once into latents and text states.

The order in which steps use them is in train/order.py.
"""
