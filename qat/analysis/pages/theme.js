"use strict";
// Before the page is drawn, so that it does not flash in the other colours. A file:// page may have no storage.
const themes = ["system", "light", "dark"];
const kept = (() => { try { return localStorage.getItem("qat-theme"); } catch { return null; } })();
document.documentElement.dataset.theme = themes.includes(kept) ? kept : "system";
