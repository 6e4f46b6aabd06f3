"""`plainsd serve`: a page and three APIs over one worker. fastapi and uvicorn are imported only when serving.

refusals.py    errors a client can put right, in each API's form
security.py    who may ask: hosts, origins, token, content types, sizes
store.py       the data folder: SQLite for jobs and history, PNG files for pictures
jobs.py        a job, how far it has come, and a bell that rings when something changes
queue.py       the jobs that wait: fair, bounded, batching what agrees, nothing lost
pictures.py    rows of the history, names of files
restore.py     settings on their way back into a request
bases.py       what a request is drawn on
models.py      models by name, loaded when wanted, least recently used out first
words.py       embeddings: words that prompts may use; folders.py: files by name
worker.py      the one thread that draws
uploads.py     pictures that come in: checked, masked, cropped, pasted back
requests.py    from a request to a job, checked at the door by the very code that will draw
service.py     all of these together, and how a job is told to a client
app.py         routes of our own API and the page; openai.py, a1111.py (and a1111_fields.py): the other two
metrics.py     Prometheus' text form
client.py      the other end; errand.py: `plainsd generate --server` by it
command.py     `plainsd serve`
"""
