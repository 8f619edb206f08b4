"use strict";
(() => {
  const controls = document.getElementById("controls"), shown = document.getElementById("shown");
  const search = document.getElementById("search"), order = document.getElementById("order");
  const body = document.querySelector("tbody"), heads = [...document.querySelectorAll("th")];
  const rows = [...body.rows], choices = [...controls.querySelectorAll("[data-field]")];
  let column = -1, sign = 1;

  const compared = (a, b) => {
    const x = a.cells[column].dataset.key, y = b.cells[column].dataset.key;
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
    return sign * (numbers ? Number(x) - Number(y) : x.localeCompare(y));
  };
  const sort = (index, direction) => {
    column = index;
    sign = direction;
    heads.forEach((head, at) => {
      if (at === index) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    body.append(...(index < 0 ? rows : [...rows].sort(compared)));
    order.value = index < 0 ? "" : String(index);
  };
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let num = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const fits = choices.every((one) => !one.value || row.dataset[one.dataset.field] === one.value);
      row.hidden = !(fits && words.every((word) => text.includes(word)));
      num += !row.hidden;
    }
    shown.textContent = `${num} of ${rows.length} results`;
  };
  const first = (index) => (heads[index].classList.contains("n") && !["n", "rank", "shots"].includes(heads[index].innerText) ? -1 : 1);

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(index, column === index ? -sign : first(index)));
    head.replaceChildren(button);
  });
  order.addEventListener("change", () => {
    const index = order.value === "" ? -1 : Number(order.value);
    sort(index, index < 0 ? 1 : first(index));
  });
  controls.addEventListener("input", filter);
  document.getElementById("all").addEventListener("click", () => {
    for (const one of [search, ...choices]) one.value = "";
    sort(-1, 1);
    filter();
  });
  controls.hidden = false;
  filter();
})();
