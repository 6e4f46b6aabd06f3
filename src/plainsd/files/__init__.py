"""Model files (part III): read, recognised and written a tensor at a time, in every layout.

Files and single networks only; checkpoint.py assembles them into a model, and adapters/ has its own files.
"""
