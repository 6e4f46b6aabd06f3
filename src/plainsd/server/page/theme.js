// Before anything is shown: the theme that was chosen last, else the system's.
try {
  const chosen = localStorage.getItem("plainsd.theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {} // the browser keeps nothing for this page
