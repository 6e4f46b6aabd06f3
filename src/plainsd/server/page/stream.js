// What becomes of jobs: one stream of events for all that the page follows. A browser opens six connections to a server
// at most, those of all its tabs together, so a page that is not seen has no stream: it asks from time to time.

import { call } from "./api.js";

const MOST = 500; // jobs of one stream
const PAUSE = 2000; // milliseconds
const followed = new Map(); // job id -> what is done on its events: progress, end, waiting, lost
let stream = null;
let timer = null;
let turn = 0; // of the stream, or of asking: what an earlier one still says is not heard

document.addEventListener("visibilitychange", listen);

export function follow(id, tasks) {
  followed.set(id, tasks);
  clearTimeout(timer);
  timer = setTimeout(listen); // once for several
}

function listen() {
  stream?.close();
  clearTimeout(timer);
  turn++;
  if (!followed.size) return;
  if (document.hidden) return ask(turn);
  const query = new URLSearchParams([...followed.keys()].slice(0, MOST).map((id) => ["id", id]));
  stream = new EventSource(`/api/events?${query}`);
  for (const name of ["progress", "end"]) stream.addEventListener(name, (event) => hear(JSON.parse(event.data)));
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) ask(turn); // why, and of which job
    else wait();
  };
}

// Each job's state at this moment; then the stream again, or the next look.
async function ask(mine) {
  try {
    const active = new Map((await call("/api/jobs?limit=0")).active.map((job) => [job.id, job]));
    for (const id of [...followed.keys()]) {
      const job = active.get(id) ?? (await call(`/api/jobs/${id}`).catch((error) => error.status === 404 ? null : Promise.reject(error)));
      if (mine !== turn) return;
      if (job) hear({ previews: {}, ...job });
      else lose(id);
    }
  } catch {
    wait();
  }
  if (mine === turn) timer = setTimeout(listen, PAUSE);
}

function hear(job) {
  const tasks = followed.get(job.id);
  if (!tasks) return; // it has ended before
  if (["queued", "running"].includes(job.state)) return tasks.progress(job);
  followed.delete(job.id);
  tasks.end(job);
  if (!followed.size || followed.size >= MOST) listen();
}

function lose(id) {
  const { lost } = followed.get(id);
  followed.delete(id);
  lost();
}

const wait = () => [...followed.values()].forEach((tasks) => tasks.waiting());
