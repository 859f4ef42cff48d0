// The two panels at the sides, and the colours of the page.

import { byId } from "./dom.js";
import { lasting, write } from "./storage.js";

const THEME = "cuplama.theme";
const WIDE = matchMedia("(min-width: 52rem)"); // from here on the list of conversations has its own column

/** Binds the buttons; gives `closeMenu()` and `closeTop()`, which is true if a panel was open over the page. */
export function bindPanels() {
  const menu = panel("menu", "sidebar", WIDE.matches);
  const tune = panel("tune", "settings", false);
  byId("scrim").addEventListener("click", () => [menu, tune].forEach((side) => side.set(false)));
  byId("settings-close").addEventListener("click", () => tune.set(false));
  WIDE.addEventListener("change", () => menu.set(WIDE.matches));
  bindTheme();
  return {
    closeMenu: () => WIDE.matches || menu.set(false),
    closeTop() {
      const top = [tune, menu].find((side) => side.isOpen() && (side === tune || !WIDE.matches));
      top?.set(false, true);
      return Boolean(top);
    },
  };
}

/** A button that opens and closes a panel. A closed one is inert: no key reaches it. */
function panel(buttonId, id, open) {
  const [toggle, side] = [byId(buttonId), byId(id)];
  const isOpen = () => !side.inert;
  const set = (on, back = false) => {
    side.inert = !on;
    side.classList.toggle("closed", !on);
    toggle.setAttribute("aria-expanded", String(on));
    if (back) toggle.focus();
  };
  toggle.addEventListener("click", () => {
    set(!isOpen());
    if (isOpen()) side.querySelector("button, input, textarea")?.focus();
  });
  set(open);
  return { isOpen, set };
}

/** Light, dark, or as the system has it. theme.js reads the choice before the first paint. */
function bindTheme() {
  const choice = byId("theme");
  choice.value = document.documentElement.dataset.theme ?? "system";
  choice.addEventListener("change", () => {
    const theme = choice.value === "system" ? null : choice.value;
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    write(lasting, THEME, theme);
  });
}
