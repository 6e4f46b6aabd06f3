// The server's own OpenAPI description as a page, where each route that takes JSON or nothing can be tried.

import { $, element } from "./api.js";

let schemas = {};

const resolved = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema ?? {});

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.filter((one) => one.type !== "null").map(typeOf).join(" or ");
  if (schema.prefixItems) return `[${schema.prefixItems.map(typeOf).join(", ")}]`;
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "anything";
}

function fields(operation) {
  const rows = (operation.parameters ?? []).map((one) => [`${one.name} (${one.in})`, one.schema, one.description, one.required]);
  const content = operation.requestBody?.content ?? {};
  for (const { schema } of Object.values(content)) {
    const body = resolved(schema);
    for (const [name, field] of Object.entries(body.properties ?? {})) {
      rows.push([name, field, field.description, (body.required ?? []).includes(name)]);
    }
  }
  return rows.map(([name, schema, description, required]) => {
    const preset = schema.default === undefined || schema.default === null || schema.default === "" ? "" : `, ${JSON.stringify(schema.default)} if left out`;
    const about = [typeOf(schema) + (required ? ", required" : preset), description].filter(Boolean).join(": ");
    return element("tr", {}, element("td", { textContent: name }), element("td", { textContent: about }));
  });
}

function trial(path, method, operation) {
  const json = operation.requestBody?.content?.["application/json"];
  if ((operation.requestBody && !json) || path.endsWith("/events") || path.includes(".png")) return null;
  const address = element("input", { value: path, ariaLabel: "Address" });
  const example = resolved(json?.schema).examples?.[0] ?? {};
  const body = json ? element("textarea", { value: JSON.stringify(example, null, 2), rows: 4, ariaLabel: "Body" }) : null;
  const send = element("button", { type: "button", className: "small", textContent: "Send" });
  const answer = element("pre", { tabIndex: 0 });
  send.onclick = async () => {
    const told = json ? { headers: { "Content-Type": "application/json" }, body: body.value } : {};
    const response = await fetch(address.value, { method: method.toUpperCase(), ...told });
    const text = await response.text();
    answer.textContent = `${response.status} ${response.statusText}\n${pretty(text).slice(0, 20000)}`;
  };
  return element("div", {}, address, ...(body ? [body] : []), send, answer);
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function route(path, method, operation) {
  const heading = element("summary", {}, element("span", { className: "method", textContent: method.toUpperCase() }),
    element("code", { textContent: path }), element("small", { textContent: (operation.description ?? operation.summary ?? "").split("\n")[0] }));
  return element("details", { className: "route" }, heading, element("table", {}, element("tbody", {}, ...fields(operation))),
    trial(path, method, operation) ?? "");
}

async function start() {
  const answer = await fetch("/openapi.json");
  if (answer.status === 401) return location.assign("/"); // where the token is asked for
  const told = await answer.json();
  schemas = told.components?.schemas ?? {};
  const groups = {};
  for (const [path, methods] of Object.entries(told.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      (groups[operation.tags?.[0] ?? "other"] ??= []).push(route(path, method, operation));
    }
  }
  $("docs").replaceChildren(element("p", { className: "hint", textContent: `${told.info.description} Version ${told.info.version}.` }),
    ...Object.entries(groups).flatMap(([name, routes]) => [element("h2", { textContent: name }), ...routes]));
}

start();
