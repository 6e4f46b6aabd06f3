"""Training (part IV): one loop, and beside it what a run is, its states, its processes.

What is trained on is in data/, what is trained in methods/, a file a method.
"""
