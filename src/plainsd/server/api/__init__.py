"""The routes: our own API, A1111's, OpenAI's, and the page; who may call them, and errors as each API puts them.

What a request means is decided below, in server/.
"""
