"""A model told, compared and timed: what is in it, its numbers beside diffusers', its seconds beside others'.

References to other libraries stand here and nowhere else.
"""
