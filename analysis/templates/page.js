// Draws the charts in place of the pictures, and lets the reader brush, filter and sort. Without it the page is complete.
(async () => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const trials = read("trials-data"), charts = read("charts-data");
  const table = document.getElementById("trial-table"), bodyRows = table ? [...table.tBodies[0].rows] : [];
  const views = [], brushes = {};
  let words = [];

  const kept = (row) => Object.entries(brushes).every(([field, [low, high]]) =>
    row[field] !== null && row[field] >= low && row[field] <= high);

  function pick() {
    const inside = new Set(trials.filter(kept).map((row) => row.trial)), shown = [];
    const brushed = Object.keys(brushes).length > 0;
    for (const row of bodyRows) {
      const trial = Number(row.dataset.trial), text = row.textContent.toLowerCase();
      row.hidden = (brushed && !inside.has(trial)) || !words.every((word) => text.includes(word));
      if (!row.hidden) shown.push(trial);
    }
    const all = !brushed && !words.length;
    if (table) document.getElementById("trial-count").textContent = `${shown.length} of ${bodyRows.length} trials`;
    const picked = all ? null : table ? shown : [...inside];
    for (const view of views) view.signal("picked", picked).runAsync();
  }

  function sortable(th, column) {
    const button = document.createElement("button");
    button.append(...th.childNodes);
    th.append(button);
    button.onclick = () => {
      const order = th.ariaSort === "ascending" ? -1 : 1;
      for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
      th.ariaSort = order > 0 ? "ascending" : "descending";
      const key = (row) => row.cells[column].dataset.sort;
      const compare = (a, b) => a === "" || b === "" ? order * ((a === "") - (b === ""))  // no value: last
        : isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      bodyRows.sort((a, b) => order * compare(key(a), key(b)));
      table.tBodies[0].append(...bodyRows);
    };
  }

  const page = document.documentElement;
  page.classList.add("live");  // first, since a chart takes the width of its place
  try {
    for (const place of document.querySelectorAll("div[data-chart]")) {
      for (const spec of charts[place.dataset.chart]) {
        const panel = place.appendChild(document.createElement("div"));
        for (const part of spec.vconcat ?? []) part.width = panel.clientWidth - 12;  // less its padding
        spec.datasets = { ...spec.datasets, trials: structuredClone(trials) };
        const { view } = await vegaEmbed(panel, spec, { actions: false, renderer: "canvas" });
        views.push(view);
        for (const name of (spec.params ?? []).map((param) => param.name).filter((name) => name.startsWith("brush")))
          view.addSignalListener(name, (_, value) => {
            const field = "u" + name.slice(5);
            if (value[field]) brushes[field] = value[field].toSorted((a, b) => a - b); else delete brushes[field];
            pick();
          });
      }
    }
  } catch (error) {
    page.classList.remove("live");
    throw error;
  }
  if (table) {
    [...table.tHead.rows[0].cells].forEach(sortable);
    document.getElementById("trial-filter").oninput = (event) => {
      words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      pick();
    };
    pick();
  }
})();
