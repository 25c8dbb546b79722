// Run before anything is painted, so that a page chosen to be dark never shows white first.
(() => {
  let theme = "";
  try { theme = localStorage.getItem("jaxllm.theme") ?? ""; } catch { /* storage is forbidden: as the system */ }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
