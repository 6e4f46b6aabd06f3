"""Words (part III): the tokenizer, and prompts as people write them.

Text in, text and numbers out, without tensors; what the text encoder makes of them is in pictures/conditioning.py.
"""
