"use strict";
document.querySelectorAll("[data-switch]").forEach(bar => {
  const kind = bar.dataset.switch, buttons = [...bar.querySelectorAll("button")];
  const choose = value => {
    buttons.forEach(b => b.setAttribute("aria-pressed", b.dataset.value === value));
    document.querySelectorAll(`[data-${kind}]`).forEach(part => { part.hidden = part.dataset[kind] !== value; });
  };
  buttons.forEach(b => b.addEventListener("click", () => choose(b.dataset.value)));
  bar.hidden = false;
  choose(buttons[0].dataset.value);
});
document.querySelectorAll("th[aria-sort] button").forEach(button => button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, body = row.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(head), down = head.getAttribute("aria-sort") !== "descending";
  [...row.cells].forEach(cell => cell.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = line => parseFloat(line.cells[column].dataset.sort);
  const text = line => line.cells[column].textContent;
  const numbers = [...body.rows].some(line => line.cells[column].dataset.sort);
  [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (numbers && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
    const order = numbers ? x - y : text(b).localeCompare(text(a));
    return down ? -order : order;
  }).forEach(line => body.append(line));
}));
const filter = document.querySelector(".filter input"), status = document.querySelector("[role=status]");
filter.parentElement.hidden = false;
filter.addEventListener("input", () => {
  const words = filter.value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, all = 0;
  document.querySelectorAll("main tbody tr").forEach(line => {
    const text = line.textContent.toLocaleLowerCase();
    line.hidden = !words.every(word => text.includes(word));
    shown += !line.hidden;
    all += 1;
  });
  status.textContent = words.length ? `${shown} of ${all} rows` : "";
});
const dialog = document.querySelector("dialog"), inside = dialog.querySelector("div");
document.querySelectorAll(".open").forEach(button => button.addEventListener("click", () => {
  const figure = button.closest("figure"), prompt = button.closest(".prompt").querySelector(".text");
  const scores = document.createElement("p");
  scores.className = "soft";
  scores.textContent = [...figure.querySelectorAll("figcaption span")].map(part => part.textContent).join(" · ");
  const nodes = [figure.querySelector(".of"), button.querySelector("img"), prompt].map(node => node.cloneNode(true));
  inside.replaceChildren(...nodes, scores);
  dialog.showModal();
}));
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
