"""The mathematics of noise (part I): the schedule, what a network's prediction means, the samplers.

No networks, no files, no prompts: a model is a function of x and sigma here.
"""
