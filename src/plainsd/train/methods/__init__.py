"""Training methods, one file each: the trainable weights and the loss.

The loop is in train/loop.py; train/from_scratch.py and train/from_model.py set up runs.
"""
