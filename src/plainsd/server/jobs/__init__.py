"""The job queue and its worker thread: jobs, scheduling, database and pictures.

Independent of HTTP.
"""
