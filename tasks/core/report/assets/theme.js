"use strict";
/* The switch of colours: as the system, light, dark. */
(() => {
  const themes = ["system", "light", "dark"];
  document.getElementById("theme").addEventListener("click", (event) => {
    const root = document.documentElement;
    const next = themes[(themes.indexOf(root.dataset.theme || "system") + 1) % themes.length];
    root.dataset.theme = next;
    event.currentTarget.textContent = `Colours: ${next}`;
    event.currentTarget.setAttribute("aria-label", `Colours: ${next}`);
  });
})();
