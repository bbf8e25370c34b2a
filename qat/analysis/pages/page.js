// The colours: as the system has them, light, dark.
const root = document.documentElement, themeButton = document.getElementById("theme");
function showTheme() { themeButton.textContent = `Colours: ${root.dataset.theme}`; }
themeButton.addEventListener("click", () => {
  root.dataset.theme = themes[(themes.indexOf(root.dataset.theme) + 1) % themes.length];
  try { localStorage.setItem("qat-theme", root.dataset.theme); } catch { /* only this page, then */ }
  showTheme();
});
showTheme();

// A click on a heading sorts its table by that column; a second click turns the order. Missing values stay last, and
// what was unfolded below a row goes with it.
const headings = [...document.querySelectorAll("thead th > button")].map((button) => [button.closest("th"), button]);
for (const [heading, button] of headings) {
  button.addEventListener("click", () => {
    const table = button.closest("table"), body = table.tBodies[0];
    const down = heading.getAttribute("aria-sort") === "ascending";
    const numeric = heading.classList.contains("number");
    const value = (row) => {
      const raw = row.cells[heading.cellIndex].dataset.value;
      return raw === undefined ? null : numeric ? Number(raw) : raw;
    };
    const compare = (a, b) => numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    const groups = [];
    for (const row of body.rows) {
      if (row.classList.contains("detail")) groups.at(-1)[1].push(row);
      else groups.push([value(row), [row]]);
    }
    groups.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return down ? compare(b, a) : compare(a, b);
    });
    body.append(...groups.flatMap(([, rows]) => rows));
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  });
}

// Paper cannot unfold, and browsers repeat the headings of a table on each page only if they have no buttons.
const unfolded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    unfolded.push(details);
  }
  for (const [heading, button] of headings) heading.textContent = button.textContent;
});
addEventListener("afterprint", () => {
  for (const details of unfolded.splice(0)) details.open = false;
  for (const [heading, button] of headings) heading.replaceChildren(button);
});
