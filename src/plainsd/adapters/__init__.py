"""What is added to a loaded model: LoRAs of every dialect, and textual inversion, on a model and in files.

How they are trained is in train/methods/.
"""
