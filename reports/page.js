"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
const minus = text => text.replaceAll("-", "\u2212");

// which prompt set and guidance, and which statistic, is shown
const chosen = {setting: "0"};
all("[data-switch]").forEach(control => {
  const kind = control.dataset.switch, buttons = all("button", control), list = control.matches("select");
  const choose = value => {
    chosen[kind] = value;
    buttons.forEach(button => button.setAttribute("aria-pressed", button.value === value));
    all(`[data-${kind}]`).forEach(part => { part.hidden = part.dataset[kind] !== value; });
    all(".scroll").forEach(further);
  };
  buttons.forEach(button => button.addEventListener("click", () => choose(button.value)));
  if (list) control.addEventListener("change", () => choose(control.value));
  (list ? control.parentElement : control).hidden = false;
  choose(list ? control.value : buttons[0].value);
});

// what is wider than its place fades where it goes on
function further(box) {
  box.classList.toggle("further", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
}
const sizes = new ResizeObserver(entries => entries.forEach(entry => further(entry.target)));
all(".scroll").forEach(box => {
  box.addEventListener("scroll", () => further(box), {passive: true});
  sizes.observe(box);
});

// tables sort by a heading and are filtered by a word
all("th[aria-sort] button").forEach(button => button.addEventListener("click", () => {
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
const words = text => text.toLocaleLowerCase().split(/\s+/).filter(Boolean);
const filter = one(".filter input");
filter.parentElement.hidden = false;
filter.addEventListener("input", () => {
  const wanted = words(filter.value), lines = all("main tbody tr");
  lines.forEach(line => {
    const text = line.textContent.toLocaleLowerCase();
    line.hidden = !wanted.every(word => text.includes(word));
  });
  const shown = lines.filter(line => !line.hidden).length;
  one("main [role=status]").textContent = wanted.length ? `${shown} of ${lines.length} rows` : "";
});

// on paper everything is open
addEventListener("beforeprint", () => all("details:not([open])").forEach(part => {
  part.open = true;
  part.dataset.opened = "";
}));
addEventListener("afterprint", () => all("[data-opened]").forEach(part => {
  part.open = false;
  delete part.dataset.opened;
}));

// two models side by side, one prompt at a time
const dialog = one("dialog");
if (dialog) {
  const numbers = JSON.parse(one("#numbers").textContent);
  const sides = all("[data-side]", dialog), find = one("[data-find]", dialog), by = one("[data-by]", dialog);
  const order = one("[data-order]", dialog), drawn = one("[data-drawn]", dialog), text = one(".text", dialog);
  let setting, prompts, lowered, rows, list = [], place = 0;

  const options = (select, names) => {
    const before = select.value;
    select.replaceChildren(...names.map((name, index) => new Option(name, index)));
    if (before !== "" && before < names.length) select.value = before;
  };
  const score = (column, side, prompt) => setting.scores[column][sides[side].value][prompt];
  const gain = (column, prompt) => {
    const [left, right] = [0, 1].map(side => score(column, side, prompt));
    return left === null || right === null ? null : right - left;
  };
  const use = () => {
    const part = one(`section[data-setting="${chosen.setting}"]`);
    setting = numbers.settings[chosen.setting];
    prompts = numbers.prompts[setting.set];
    lowered = prompts.map(prompt => prompt.toLocaleLowerCase());
    rows = new Map(all(".prompt", part).map(row => [Number(row.dataset.prompt), all("figure", row)]));
    sides.forEach(select => options(select, setting.models));
    options(by, setting.columns.map(column => column.title));
  };
  const arrange = kept => {
    const wanted = words(find.value), column = by.value, sign = order.value * setting.columns[column].sign;
    list = [...prompts.keys()].filter(prompt =>
      (!drawn.checked || rows.has(prompt)) && wanted.every(word => lowered[prompt].includes(word)));
    if (sign) {
      list = list.filter(prompt => gain(column, prompt) !== null);
      list.sort((a, b) => sign * (gain(column, b) - gain(column, a)));
    }
    place = Math.max(0, list.indexOf(kept));
    show();
  };
  const show = () => {
    const prompt = list[place], none = prompt === undefined;
    text.textContent = none ? "No prompt is left: change the filter." : prompts[prompt];
    one("[role=status]", dialog).textContent = none ? "0 prompts" : `${place + 1} of ${list.length} prompts`;
    all("figure", dialog).forEach((figure, side) => {
      const own = !none && rows.has(prompt) ? rows.get(prompt)[sides[side].value] : null;
      const source = own && one("img", own), image = one("img", figure);
      one(".missing", figure).hidden = Boolean(source);
      image.hidden = !source;
      if (source) Object.assign(image, {src: source.src, alt: source.alt, className: source.className});
      one(".swatch", figure).className = one(`.row figure:nth-child(${Number(sides[side].value) + 1}) .swatch`,
        one(`section[data-setting="${chosen.setting}"]`)).className;
    });
    one("tbody", dialog).replaceChildren(...(none ? [] : setting.columns).map((column, index) => {
      const line = document.createElement("tr"), head = document.createElement("th");
      const values = [score(index, 0, prompt), score(index, 1, prompt), gain(index, prompt)];
      head.scope = "row";
      head.textContent = column.title;
      line.append(head, ...values.map((value, position) => {
        const cell = document.createElement("td"), written = value === null ? "–" : value.toFixed(column.places);
        const zero = value === null || !parseFloat(written), signed = position === 2 && value > 0 && !zero;
        cell.textContent = (signed ? "+" : "") + minus(zero ? written.replace("-", "") : written);
        if (position === 2 && !zero) cell.className = value * column.sign > 0 ? "better" : "worse";
        return cell;
      }));
      return line;
    }));
  };
  const open = (model, prompt) => {
    use();
    sides[0].value = 0;
    sides[1].value = model || setting.models.length - 1;
    find.value = "";
    arrange(prompt);
    dialog.showModal();
    one("[data-step='1']", dialog).focus();
    all(".scroll", dialog).forEach(further);
  };
  const step = by => {
    if (!list.length) return;
    place = (place + by + list.length) % list.length;
    show();
  };
  all(".compare").forEach(button => {
    button.hidden = false;
    button.addEventListener("click", () => open());
  });
  all(".open").forEach(button => button.addEventListener("click", () => {
    const figure = button.closest("figure");
    open([...figure.parentElement.children].indexOf(figure), Number(button.closest(".prompt").dataset.prompt));
  }));
  sides.concat(by, order, drawn).forEach(control => control.addEventListener("change", () => arrange(list[place])));
  find.addEventListener("input", () => arrange(list[place]));
  all("[data-step]", dialog).forEach(button => button.addEventListener("click", () => step(Number(button.dataset.step))));
  one("[data-close]", dialog).addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!by || event.target.matches("select, [type=search]") || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    step(by);
  });
}
