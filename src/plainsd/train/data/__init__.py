"""What is trained on: captioned pictures found, read, cut, and turned into latents and text once.

Which of them a step shows is told by train/order.py.
"""
