// Runs before the first paint, so that a chosen light or dark page does not flash in the other colours.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("cuplama.theme");
  } catch {
    // Storage may be switched off; the system's colours do then.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
