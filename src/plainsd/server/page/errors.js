// Errors, each beside the field that it is about.

import { $, element } from "./api.js";

export function clearErrors() {
  $("form-error").textContent = "";
  for (const old of document.querySelectorAll("[data-field] .error")) old.remove();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

// Beside the field if the error is about one, or beside the unit of it; else below the button.
export function showError(error) {
  clearErrors();
  const field = error.field && document.querySelector(`[data-field="${CSS.escape(error.field)}"]`);
  const place = field?.querySelector(`[data-entry="${error.entry}"]`) ?? field;
  if (!place || place.closest("[hidden]")) {
    $("form-error").textContent = error.message;
    return;
  }
  for (let inside = place; inside; inside = inside.parentElement) if (inside.tagName === "DETAILS") inside.open = true;
  const id = `error-${error.field}`;
  place.append(element("p", { className: "error", id, textContent: error.message, role: "alert" }));
  const input = place.querySelector("input:not([type=file]), textarea, select");
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-describedby", id);
  input?.focus();
}
