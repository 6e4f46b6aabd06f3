// Requests to the server, and what every part of the page says to the reader.

export const $ = (id) => document.getElementById(id);

export class Refused extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.field = error.field;
    this.entry = error.entry; // of a field that is a list
  }
}

// JSON in, JSON out. An error of the server is a Refused; without a valid token the login is shown first.
export async function call(path, body, method) {
  const answer = await answered(path, body, method);
  return answer.status === 204 ? null : answer.json();
}

// JSON in, a file out.
export const fileOf = async (path, body) => (await answered(path, body)).blob();

async function answered(path, body, method = body === undefined ? "GET" : "POST") {
  const json = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, { method, ...json });
  } catch {
    throw new Refused(0, { message: "The server cannot be reached; is it still running?" });
  }
  if (answer.status === 401 && path !== "/api/login") {
    await login();
    return answered(path, body, method);
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, told.error ?? { message: `The server answered ${answer.status}.` });
}

let open = null;

function login() {
  open ??= new Promise((resolve) => {
    $("login").showModal();
    $("login").oncancel = (event) => event.preventDefault();
    $("login").onclose = () => open && !$("login").open && $("login").showModal(); // Chromium closes it at a second Escape
    $("login-form").onsubmit = async (event) => {
      event.preventDefault();
      try {
        await call("/api/login", { token: $("token").value });
        $("login").close();
        open = null;
        resolve();
        $("prompt")?.focus();
      } catch (error) {
        $("login-error").textContent = error.message;
      }
    };
  });
  return open;
}

// --- elements -----------------------------------------------------------------------------------------------------

// An element with properties and children. Text is always set as text, never as HTML.
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function say(text) {
  $("live").textContent = text;
}

let hiding;

export function toast(text, button, action) {
  $("toast-text").textContent = text;
  $("toast-button").hidden = !button;
  $("toast-button").textContent = button ?? "";
  $("toast-button").onclick = () => {
    $("toast").hidden = true;
    action();
  };
  $("toast").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => ($("toast").hidden = true), 8000);
}

export async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}
