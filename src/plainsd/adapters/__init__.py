"""Adapters (LoRA and its relatives, textual inversion), on a model and in files of every dialect.

Training them is in train/methods/.
"""
