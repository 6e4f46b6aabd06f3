"""The embedded model: how its training pictures are drawn, and how well it draws them.

Its weights are in assets/emoji/, the recipe that made them in recipes/emoji/.
"""
