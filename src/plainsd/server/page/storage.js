// What the browser keeps for this page between two visits, as text. Where it keeps nothing (site data is blocked, or the disk is
// full), the page goes on without.

export function read(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function write(name, text) {
  try {
    localStorage.setItem(name, text);
  } catch {} // see above
}
