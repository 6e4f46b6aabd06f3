"""`plainsd serve`: a page and three APIs over one thread that draws. Only serving imports fastapi and uvicorn.

Here: what a request may say (schema.py, limits.py), what it means (requests.py, restore.py, uploads.py, canvas.py), and
what it needs (pool.py: models, embeddings.py and folders.py: adapters by name). service.py puts all of it together for
the routes, client.py is the other end. The queue and the drawing are in jobs/, routes and the page in api/ and page/,
the command in commands/serve.py.
"""
