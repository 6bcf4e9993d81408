(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const rowAt = new Map(data.rows.map((row) => [`${row.group} ${row.label}`, row]));
  const chartAt = new Map(data.charts.map((chart) => [chart.id, chart]));
  const switchedOff = new Set();
  const drawn = new Set();
  const traits = [...form.querySelectorAll("select")].map((select) => select.name)
    .filter((name) => name !== "stream" && name !== "model");

  // Plotly reads some HTML in its texts; names are to be shown as they are.
  const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // ---- filters

  const passes = (row) => {
    const value = (name) => form.elements[name].value;
    const boxes = [...form.querySelectorAll("input[name=editor]")];
    return (!value("stream") || value("stream") === row.stream)
      && (!value("model") || value("model") === row.model)
      && traits.every((trait) => !value(trait) || (row.traits && row.traits[trait] === (value(trait) === "yes")))
      && row.text.includes(value("text").trim().toLowerCase())
      && boxes.some((box) => box.checked && box.value === row.editor);
  };

  const apply = () => {
    for (const row of data.rows) row.isShown = passes(row);
    for (const element of document.querySelectorAll("[data-label]")) {
      element.hidden = !rowAt.get(`${element.dataset.group} ${element.dataset.label}`).isShown;
    }
    const shown = data.rows.filter((row) => row.isShown);
    const groups = new Set(shown.map((row) => row.group));
    for (const section of document.querySelectorAll("[data-section]")) {
      section.hidden = !groups.has(section.dataset.section);
    }
    document.getElementById("nothing").hidden = shown.length > 0;
    document.getElementById("shown").textContent = `${shown.length} of ${data.rows.length} rows shown`;
    for (const id of drawn) draw(id);
  };

  form.addEventListener("change", apply);
  form.elements.text.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  // The form is reset only after the event.
  form.addEventListener("reset", () => setTimeout(() => { switchedOff.clear(); apply(); }));

  // ---- sorting

  const sort = (header) => {
    const first = header.querySelector("button").dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const direction = header.getAttribute("aria-sort") === first ? other : first;
    for (const sibling of header.parentElement.children) sibling.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", direction);
    const sign = direction === "ascending" ? 1 : -1;
    const isNumber = header.classList.contains("number");
    const key = (row) => {
      const cell = row.children[header.cellIndex];
      return isNumber ? Number.parseFloat(cell.dataset.value) : cell.textContent.trim();
    };
    const body = header.closest("table").tBodies[0];
    const keyed = [...body.rows].map((row) => [key(row), row]);
    keyed.sort(([a], [b]) => {
      if (!isNumber) return sign * a.localeCompare(b, undefined, { numeric: true });
      // What is missing is neither great nor small: it comes last.
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return a === b ? 0 : a < b ? -sign : sign;
    });
    body.append(...keyed.map(([, row]) => row));
  };

  for (const header of document.querySelectorAll("table.sortable thead th")) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }

  // ---- charts

  const traces = (chart, colour) => chart.series.flatMap((series) => {
    const label = data.labels[series.label];
    const name = literal(label.name);
    const row = rowAt.get(`${chart.group} ${series.label}`);
    const isOff = switchedOff.has(`${chart.group} ${series.label}`);
    const visible = !row.isShown ? false : isOff ? "legendonly" : true;
    const ink = colour(`--c${label.colour}`);
    const hasBand = series.n.some((n) => n > 1);
    const digits = (value) => Number(value.toPrecision(4)).toString();
    const text = series.x.map((x, i) => {
      const range = series.n[i] > 1 ? ` (${digits(series.low[i])} to ${digits(series.high[i])}, ${series.n[i]} seeds)` : "";
      const where = series.note ? literal(series.note[i]) : `${digits(x)} ${chart.x}`;
      return `<b>${name}</b><br>${digits(series.y[i])}${range}<br>${where}`;
    });
    const line = {
      type: "scatter", x: series.x, y: series.y, text, name, visible, meta: series.label, legendgroup: `${series.label}`,
      showlegend: true, hovertemplate: "%{text}<extra></extra>",
      mode: chart.kind === "scatter" ? "markers" : "lines+markers",
      line: { color: ink, width: 2, dash: label.dash },
      marker: { color: ink, symbol: label.symbol, size: chart.kind === "scatter" ? 13 : 7, maxdisplayed: 12 },
    };
    if (chart.kind === "scatter") {
      if (hasBand) {
        line.error_y = {
          type: "data", symmetric: false, color: ink, thickness: 1.5, width: 4,
          array: series.y.map((y, i) => series.high[i] - y), arrayminus: series.y.map((y, i) => y - series.low[i]),
        };
      }
      return [line];
    }
    if (!hasBand || !form.elements.bands.checked) return [line];
    const band = {
      type: "scatter", mode: "lines", x: [...series.x, ...series.x.toReversed()],
      y: [...series.high, ...series.low.toReversed()], fill: "toself", fillcolor: ink, opacity: 0.16, line: { width: 0 },
      hoverinfo: "skip", showlegend: false, legendgroup: `${series.label}`, visible: visible === true, meta: series.label,
    };
    return [band, line];
  });

  const last = (chart) => Math.max(...chart.series.flatMap((series) => series.x));

  const layout = (chart, colour) => {
    const axis = { gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true };
    const title = (text) => ({ text: literal(text), standoff: 8 });
    return {
      margin: { l: 44, r: 10, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: 12, family: getComputedStyle(document.body).fontFamily },
      hovermode: "closest", hoverlabel: { bgcolor: colour("--raised"), font: { color: colour("--ink") }, align: "left" },
      xaxis: {
        ...axis, title: title(chart.x),
        // Of a run of a few edits, ticks would stand between two of them.
        ...(chart.kind === "scatter" ? { type: "log", dtick: 1 } : { rangemode: "tozero", ...(last(chart) < 10 ? { dtick: 1 } : {}) }),
      },
      yaxis: {
        ...axis, title: title(chart.y),
        ...(chart.log ? { type: "log" } : chart.share ? { range: [-0.03, 1.03] } : { rangemode: "tozero" }),
      },
      // A finger on a chart scrolls the page.
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      legend: { orientation: "h", x: 0, y: -0.2, yanchor: "top", maxheight: 0.35 },
    };
  };

  const draw = (id) => {
    const chart = chartAt.get(id);
    const element = document.getElementById(id);
    // What is hidden has no size to draw in; it is drawn when filters show it again.
    if (element.offsetParent === null) return;
    observer.unobserve(element);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    const isNew = !drawn.has(id);
    drawn.add(id);
    Plotly.react(element, traces(chart, colour), layout(chart, colour), config);
    if (!isNew) return;
    element.on("plotly_legendclick", (event) => {
      const key = `${chart.group} ${event.data[event.curveNumber].meta}`;
      if (!switchedOff.delete(key)) switchedOff.add(key);
      for (const other of drawn) if (chartAt.get(other).group === chart.group) draw(other);
      return false;
    });
    element.on("plotly_legenddoubleclick", () => false);
  };

  // Charts are drawn when they come into view: hundreds of them would keep the page from opening.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) draw(entry.target.id);
    }
  }, { rootMargin: "400px" });
  if (matchMedia("(max-width: 40rem)").matches) form.querySelector("details").open = false;
  apply();
  for (const chart of data.charts) observer.observe(document.getElementById(chart.id));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const id of drawn) draw(id); });
})();
