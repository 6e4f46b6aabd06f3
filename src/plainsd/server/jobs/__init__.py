"""The queue, and the one thread that draws: jobs, their order, their database and their pictures.

Knows nothing of HTTP.
"""
