"""Workers in processes of their own, on this machine or on others, by Ray: connecting, starting, watching, replacing.

Knows nothing of models or pictures: what a worker does is a function that its caller gives. Only `--cluster` comes
here, and Ray is imported nowhere else.
"""
