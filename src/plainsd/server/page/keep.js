// Pictures that outlive a reload, in the browser's own database: those in the form, and what each job was drawn on.

import { toast } from "./api.js";

const JOBS_KEPT = 60; // the newest
let database = null;
let warned = false;
let writing = 0;

function opened() {
  database ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("plainsd", 1);
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("form");
      asked.result.createObjectStore("jobs").createIndex("at", "at");
    };
    asked.onsuccess = () => {
      asked.result.onversionchange = () => asked.result.close();
      resolve(asked.result);
    };
    asked.onerror = () => reject(asked.error);
  });
  return database;
}

// One transaction; resolves, once it is written, with the result of the request that `act` returns.
async function within(name, mode, act) {
  const transaction = (await opened()).transaction(name, mode);
  return new Promise((resolve, reject) => {
    const request = act(transaction.objectStore(name));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

async function write(name, act) {
  document.documentElement.dataset.saving = ++writing;
  try {
    await within(name, "readwrite", act);
  } catch (error) {
    if (!warned) toast(`This browser does not keep the form's pictures (${error.message}): they are gone when the page is closed.`);
    warned = true;
  } finally {
    if (--writing === 0) delete document.documentElement.dataset.saving;
  }
}

const read = (name, key) => within(name, "readonly", (store) => store.get(key)).catch(() => undefined);

// A part of the form by its name: "start", "controls", "prompts".
export const keepForm = (part, value) => write("form", (store) => store.put(value, part));
export const keptForm = (part) => read("form", part);

// What a job was drawn on; that of the oldest is forgotten.
export function keepJob(id, inputs) {
  return write("jobs", (store) => {
    const counted = store.count();
    counted.onsuccess = () => {
      let left = counted.result - JOBS_KEPT;
      if (left <= 0) return;
      store.index("at").openCursor().onsuccess = (event) => {
        const cursor = event.target.result;
        if (!cursor || left-- <= 0) return;
        cursor.delete();
        cursor.continue();
      };
    };
    return store.put({ ...inputs, at: Date.now() }, id);
  });
}

export const keptJob = (id) => read("jobs", id);
