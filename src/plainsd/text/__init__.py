"""Text (part III): the tokenizer, and A1111's prompt syntax.

Text in, text and numbers out, no tensors; encoding by the text encoder is in pictures/conditioning.py.
"""
