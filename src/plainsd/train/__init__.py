"""Training (part IV): the training loop, runs, checkpoints, processes.

The data is in data/, the methods in methods/, one file each.
"""
