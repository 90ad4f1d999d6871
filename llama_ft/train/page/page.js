"use strict";
(() => {
  // Under the pointer, or where the arrow keys stand, a figure says its values in words that the page already holds.
  for (const figure of document.querySelectorAll("figure.curve")) {
    const rows = JSON.parse(figure.dataset.points), plot = figure.querySelector(".plot");
    if (!rows.length) continue;
    const first = rows[0][0], last = rows[rows.length - 1][0], width = last - first;
    const share = (row) => (width ? (row[0] - first) / width : 0.5);
    const cursor = document.createElement("i"), said = document.createElement("output");
    cursor.className = "cursor";
    said.className = "said";
    cursor.hidden = said.hidden = true;
    plot.append(cursor, said);
    let at = -1;

    function show(index) {
      at = index;
      cursor.hidden = said.hidden = at < 0;
      if (at < 0) return;
      const [step, words] = rows[at], x = share(rows[at]) * plot.clientWidth;
      said.textContent = `${figure.dataset.by} ${step.toLocaleString("en")}: ${words}`;
      cursor.style.left = `${x}px`;
      said.style.left = `${Math.max(0, Math.min(x - said.offsetWidth / 2, plot.clientWidth - said.offsetWidth))}px`;
    }
    function nearest(x) {
      let low = 0, high = rows.length - 1;
      while (high - low > 1) {
        const middle = (low + high) >> 1;
        if (share(rows[middle]) < x) low = middle; else high = middle;
      }
      return x - share(rows[low]) < share(rows[high]) - x ? low : high;
    }
    const point = (event) => {
      const seat = plot.getBoundingClientRect();
      show(nearest((event.clientX - seat.left) / seat.width));
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("pointerdown", point);
    plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") show(-1); });
    plot.addEventListener("blur", () => show(-1));
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") return show(-1);
      const end = rows.length - 1, from = at < 0 ? (event.key === "ArrowLeft" ? rows.length : -1) : at;
      const next = { ArrowRight: Math.min(from + 1, end), ArrowLeft: Math.max(from - 1, 0), Home: 0, End: end }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      show(next);
    });
  }
})();
