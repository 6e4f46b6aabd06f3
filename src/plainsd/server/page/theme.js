// Before anything is shown: the theme that was chosen last, else the system's.
const chosen = localStorage.getItem("plainsd.theme");
if (chosen) document.documentElement.dataset.theme = chosen;
