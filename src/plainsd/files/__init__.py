"""Model files (part III): read, recognised and written a tensor at a time, in every layout.

Contents of files and bare networks only; put together into a model they are in checkpoint.py. Adapters have a room of
their own.
"""
