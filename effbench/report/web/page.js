"use strict";
// Everything that comes from records is written as text (textContent, setAttribute), never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (root, selector) => [...root.querySelectorAll(selector)];
  const make = (tag, text, ...children) => {
    const element = document.createElement(tag);
    if (text !== null && text !== undefined) element.textContent = text;
    element.append(...children);
    return element;
  };
  const sections = all(document, "main > section[data-place]");

  // ---- columns, order, filter ------------------------------------------------------------------

  const showDetail = (section, detail) => {
    for (const cell of all(section, "table [data-detail]")) cell.hidden = detail !== "all" && cell.dataset.detail !== detail;
  };
  const readKey = (row, place) => {
    const cell = row.cells[place];
    if (place === 0) return cell.textContent;
    const key = cell.dataset.key, number = Number(key.replace(/^(-?)inf$/, "$1Infinity"));
    return key === "" || key === "nan" ? null : Number.isNaN(number) ? key : number;
  };
  const compare = (one, other) => typeof one === "number" && typeof other === "number"
    ? one - other : String(one).localeCompare(String(other), "en", {numeric: true});
  const sortBy = (header) => {
    const table = header.closest("table"), body = table.tBodies[0], place = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of all(table, "th[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...body.rows].map((row, at) => ({row, at, key: readKey(row, place)}));
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null) || a.at - b.at;  // missing last
      return (down ? -1 : 1) * compare(a.key, b.key) || a.at - b.at;
    });
    body.append(...keyed.map(({row}) => row));
  };
  const filter = document.getElementById("filter"), found = document.getElementById("found");
  const applyFilter = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter((word) => word && word !== "-");
    let count = 0, rows = 0;
    for (const section of sections) {
      let shown = 0;
      for (const row of section.querySelector("tbody").rows) {
        const text = `${row.cells[0].textContent} ${row.className.replace("outcome-", "")}`.toLowerCase();
        row.hidden = !words.every((word) => word[0] === "-" ? !text.includes(word.slice(1)) : text.includes(word));
        shown += !row.hidden;
        rows += 1;
      }
      section.hidden = words.length > 0 && !shown;
      count += shown;
    }
    found.textContent = words.length ? `${count} of ${rows} rows` : "";
  };

  // ---- plots -----------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  // Plotly reads a little markup in texts; escaped, a name is shown as it is.
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const percent = (share) => share > 0 && share < 0.005 ? "<1 %" : share > 0.995 && share < 1 ? ">99 %" : `${Math.round(100 * share)} %`;
  const WORDS = {robust: "on the front", open: "cannot be excluded", excluded: "excluded"};
  const within = (axis, value) => Math.min(Math.max(value, axis.low), axis.high);
  const units = (axis) => axis.unit === "bytes" ? {tickformat: "~s", ticksuffix: "B"} : {};
  const scale = (axis) => ({
    title: {text: `${escape(axis.title)} (${axis.higher ? "more" : "less"} is better)`, standoff: 8},
    type: axis.logarithmic ? "log" : "linear",
    range: axis.logarithmic ? [Math.log10(axis.low), Math.log10(axis.high)] : [axis.low, axis.high],
    ...(axis.logarithmic ? {dtick: axis.high / axis.low < 100 ? "D2" : 1} : {}),
    ...units(axis),
    gridcolor: colour("rule"), linecolor: colour("rule"), zeroline: false, automargin: true, fixedrange: false,
  });
  // Names of the front, where they hide no other: those that are surest come first.
  const chooseNames = (picture, plot) => {
    const share = (axis, value) => {
      const turn = axis.logarithmic ? Math.log : Number;
      return (turn(value) - turn(axis.low)) / (turn(axis.high) - turn(axis.low));
    };
    const taken = [], named = new Map();
    for (const spot of [...picture.spots].filter((one) => one.drawn).sort((a, b) => b.probability - a.probability)) {
      const [x, y] = [share(picture.x, spot.x[0]), share(picture.y, spot.y[0])], width = 7 * spot.name.length + 8;
      // On its better side a row of the front has no other beside it.
      const right = x < 0.2 || (picture.x.higher && x < 0.8), at = x * (plot.clientWidth - 150);
      const box = [right ? at : at - width, right ? at + width : at, y * (plot.clientHeight - 120) + (picture.y.higher ? 14 : -14)];
      if (taken.some((other) => box[0] < other[1] && other[0] < box[1] && Math.abs(box[2] - other[2]) < 15)) continue;
      taken.push(box);
      named.set(spot, `${picture.y.higher ? "top" : "bottom"} ${right ? "right" : "left"}`);
    }
    return named;
  };
  const makeTraces = (picture, plot, narrow) => {
    const named = chooseNames(picture, plot);
    const traces = [{
      x: picture.corners.map((place) => within(picture.x, place[0])),
      y: picture.corners.map((place) => within(picture.y, place[1])),
      mode: "lines", name: "front as the numbers stand", line: {color: colour("soft"), width: 2}, hoverinfo: "skip",
    }];
    const looks = {
      robust: {symbol: "circle", color: colour("accent")},
      open: {symbol: "circle-open", color: colour("accent")},
      excluded: {symbol: "x-thin-open", color: colour("grey")},
    };
    for (const [status, look] of Object.entries(looks)) {
      const place = (spot) => [within(picture.x, spot.x[0]), within(picture.y, spot.y[0])];
      const isIn = (spot) => place(spot)[0] === spot.x[0] && place(spot)[1] === spot.y[0];
      const spots = picture.spots.filter((spot) => spot.status === status);
      spots.sort((one, other) => isIn(other) - isIn(one));  // the first stands in the legend
      if (!spots.length) continue;
      const bar = (way) => ({
        type: "data", symmetric: false, thickness: 1, width: 0, color: status === "excluded" ? colour("rule") : colour("soft"),
        array: spots.map((spot) => isIn(spot) ? spot[way][2] - spot[way][0] : 0),
        arrayminus: spots.map((spot) => isIn(spot) ? spot[way][0] - spot[way][1] : 0),
      });
      const arrow = (spot) => spot.y[0] > picture.y.high ? "triangle-up" : spot.y[0] < picture.y.low ? "triangle-down"
        : spot.x[0] > picture.x.high ? "triangle-right" : "triangle-left";
      traces.push({
        x: spots.map((spot) => place(spot)[0]), y: spots.map((spot) => place(spot)[1]),
        error_x: bar("x"), error_y: bar("y"), mode: narrow || status === "excluded" ? "markers" : "markers+text", cliponaxis: false,
        name: {robust: "front, 90 % or more", open: "cannot be excluded", excluded: "excluded at 5 %"}[status],
        marker: {size: 9, color: look.color, symbol: spots.map((spot) => isIn(spot) ? look.symbol : arrow(spot)), line: {color: look.color, width: 1.5}},
        text: spots.map((spot) => named.has(spot) ? escape(spot.name) : ""),
        textposition: spots.map((spot) => named.get(spot) || "top right"), textfont: {size: 11, color: colour("ink")},
        customdata: spots.map((spot) => [escape(spot.name), ...[spot.x, spot.y].map((numbers) => describe(numbers)), escape(percent(spot.probability)), WORDS[status]]),
        hovertemplate: "<b>%{customdata[0]}</b><br>" + `${escape(picture.y.title)}: %{customdata[2]}<br>${escape(picture.x.title)}: %{customdata[1]}`.replace(/%(?!\{)/g, "&#37;") + "<br>%{customdata[3]}: %{customdata[4]}<extra></extra>",
        rows: spots.map((spot) => spot.name),
      });
    }
    return traces;
  };
  const describe = ([value, low, high]) => {
    const show = (number) => Math.abs(number) >= 1e5 ? number.toExponential(3) : String(Number(number.toPrecision(4)));
    return low === high ? show(value) : `${show(value)} [${show(low)}–${show(high)}]`;
  };
  const drawPlot = (section) => {
    const plots = data.plots[section.dataset.place];
    const [y, x] = ["y", "x"].map((way) => section.querySelector(`.axis-${way}`).value);
    const plot = section.querySelector(".plot"), said = section.querySelector(".said");
    const picture = plots.pictures.find((one) => one.x.metric === x && one.y.metric === y);
    if (!picture) {
      Plotly.purge(plot);
      said.textContent = "Too few rows have both.";
      return;
    }
    const narrow = plot.clientWidth < 600;
    Plotly.react(plot, makeTraces(picture, plot, narrow), {
      xaxis: scale(picture.x), yaxis: scale(picture.y), paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: colour("ink"), size: 12, family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"},
      margin: {l: 10, r: narrow ? 14 : 80, t: 12, b: 10}, hovermode: "closest", dragmode: narrow ? false : "zoom",
      legend: {orientation: "h", y: -0.18, yanchor: "top", x: 0},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("grey"), activecolor: colour("accent")},
      hoverlabel: {bgcolor: colour("raised"), bordercolor: colour("rule"), font: {color: colour("ink")}},
    }, {responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d"]});
    const named = (status) => picture.spots.filter((spot) => spot.status === status).map((spot) => spot.name);
    const open = named("open").length, absent = picture.absent.map(([name, why]) => `${name} (${why})`);
    plot.setAttribute("aria-label", `${picture.y.title} against ${picture.x.title}. On the front: ${named("robust").join(", ") || "no row for certain"}.`);
    said.textContent = [
      `Bars: 95 % intervals of each row by itself; rows are compared item by item. ${open} of ${picture.spots.length} rows may be on the front or not: they cannot be excluded.`,
      picture.once.length ? `Measured once, and taken as exact: ${picture.once.join(", ")}.` : "",
      absent.length ? `Without a place: ${absent.join(", ")}.` : "",
    ].join(" ");
    if (!plot.listening) {
      plot.listening = true;
      plot.on("plotly_click", ({points: [point]}) => {
        const name = (point.data.rows || [])[point.pointNumber];
        const number = data.rows.findIndex((row) => row.name === name && row.table === section.querySelector("h2").textContent);
        if (number >= 0) location.hash = `row-${number}`;
      });
    }
  };
  const preparePlot = (section) => {
    const plots = data.plots[section.dataset.place];
    if (!plots.pictures.length) return;
    for (const way of ["x", "y"]) {
      const select = section.querySelector(`.axis-${way}`);
      select.append(...Object.entries(plots[way]).map(([metric, title]) => Object.assign(make("option", title), {value: metric})));
      select.addEventListener("change", () => drawPlot(section));
    }
    section.querySelector(".figure").hidden = false;
    watcher.observe(section);
  };
  const drawn = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const {target, isIntersecting} of entries) {
      if (!isIntersecting || drawn.has(target)) continue;
      drawn.add(target);
      drawPlot(target);
    }
  }, {rootMargin: "300px"});

  // ---- records ---------------------------------------------------------------------------------

  const dialog = document.getElementById("record"), content = dialog.querySelector(".content");
  const show = (value) => typeof value === "string" ? value : JSON.stringify(value, null, 1);
  const makeTable = (header, rows) => {
    const table = make("table");
    const line = (cells, tag) => make("tr", null, ...cells.map((cell) => cell instanceof Node ? make(tag, null, cell) : make(tag, cell)));
    if (header) table.append(make("thead", null, line(header, "th")));
    table.append(make("tbody", null, ...rows.map((row) => line(row, "td"))));
    const frame = make("div", null, table);
    frame.className = "scroll";
    return frame;
  };
  const list = (values) => makeTable(null, Object.entries(values)
    .filter(([, value]) => value !== "" && value !== null && value !== undefined && !(typeof value === "object" && !Object.keys(value).length))
    .map(([name, value]) => [name, typeof value === "object" ? make("pre", show(value)) : String(value)]));
  const number = (value) => value === null || value === undefined ? "–" : String(value);
  const findings = (values) => Object.entries(values || {}).map(([name, value]) => `${name}: ${value}`).join("; ");
  const define = (metric) => {
    const place = data.metrics[metric];
    if (place === null || place === undefined) return make("p", "This version of effbench does not define it.");
    const [, unit, better, meaning] = data.definitions[place];
    const link = Object.assign(make("a", "its definition"), {href: `#metric-${place}`});
    return make("p", `${meaning}${unit ? ` Unit: ${unit}.` : ""}${better === "neither" ? "" : ` The ${better}, the better.`} `, link);
  };
  const tellMetric = (records, metric) => [
    make("h3", metric), define(metric),
    makeTable(["seed", "value", "low", "high", "items", "found"], records.map((record) => {
      const [value, low, high, n, found] = record.metrics[metric] || [null, null, null, null, {}];
      return [String(record.cell.seed), number(value), number(low), number(high), number(n), findings(found)];
    })),
    ...[...new Set(records.map((record) => record.protocols[metric]).filter((place) => place !== undefined))]
      .map((place) => make("p", `Protocol: ${data.protocols[place]}`)),
  ];
  const tellRecord = (record, metric) => {
    const block = make("details", null, make("summary", `Record ${record.name}`));
    block.addEventListener("toggle", () => {
      if (!block.open || block.childElementCount > 1) return;
      const {metrics, protocols, cell, environment, name, ...rest} = record, own = data.environments[environment];
      const numbers = makeTable(["metric", "value", "low", "high", "items", "found", "protocol"], Object.entries(metrics).map(
        ([key, [value, low, high, n, found]]) => [key, number(value), number(low), number(high), number(n), findings(found), data.protocols[protocols[key]] || ""]));
      for (const row of all(numbers, "tbody tr")) row.classList.toggle("chosen", row.cells[0].textContent === metric);
      block.append(
        make("h3", "Outcome and cost"), list(rest), make("h3", "Cell"), list(cell),
        make("h3", "Environment and commit"), list(own), make("h3", "Metrics"), numbers);
    });
    return block;
  };
  const openRow = (row, metric) => {
    const records = row.records.map((place) => data.records[place]), first = records[0], own = data.environments[first.environment];
    dialog.querySelector("h2").textContent = `${row.name}, ${row.table}`;
    const failed = records.filter((record) => record.outcome !== "ok");
    content.replaceChildren(
      ...(metric ? tellMetric(records, metric) : []),
      make("h3", "What was run"),
      list({
        recipe: first.cell.steps || "the unchanged model", model: first.cell.model, data: first.cell.data,
        tier: first.cell.tier, outcome: [...new Set(records.map((record) => record.outcome))].join(", "),
        reason: failed.map((record) => record.reason).join("; "), machine: own.machine, host: own.host,
        commit: own.commit ? `${own.commit}${own.dirty ? " with changes" : ""}` : "", started: first.started,
      }),
      make("h3", records.length === 1 ? "Record" : "Records"),
      ...records.map((record) => tellRecord(record, metric)));
    if (records.length === 1) content.querySelector("details").open = true;
    if (!dialog.open) dialog.showModal();
    content.scrollTop = 0;
  };
  let before = null;
  const follow = () => {
    const match = /^#row-(\d+)(?:\/(.+))?$/.exec(decodeURIComponent(location.hash));
    const row = match && data.rows[match[1]];
    if (row) {
      before = before || document.activeElement;
      openRow(row, match[2]);
    } else if (dialog.open) dialog.close();
  };
  dialog.addEventListener("close", () => {
    if (/^#row-/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search);
    if (before && /^#?$|^#row-/.test(location.hash)) before.focus();
    before = null;
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest(".close")) dialog.close();
  });

  // ---- colours ---------------------------------------------------------------------------------

  const theme = document.getElementById("theme"), root = document.documentElement;
  const themes = {"": ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"]};
  const remember = (name) => { try { localStorage.setItem("effbench-theme", name); } catch { /* not from a file */ } };
  const recall = () => { try { return localStorage.getItem("effbench-theme") || ""; } catch { return ""; } };
  const setTheme = (name) => {
    if (name) root.dataset.theme = name; else delete root.dataset.theme;
    [theme.textContent] = themes[name];
    theme.setAttribute("aria-label", `Colours: ${themes[name][1]}`);
    drawn.forEach(drawPlot);
  };
  theme.addEventListener("click", () => {
    const names = Object.keys(themes), next = names[(names.indexOf(root.dataset.theme || "") + 1) % names.length];
    remember(next);
    setTheme(next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(drawPlot));

  setTheme(themes[recall()] ? recall() : "");
  for (const section of sections) {
    preparePlot(section);
    section.querySelector(".detail").addEventListener("change", (event) => showDetail(section, event.target.value));
    for (const button of all(section, "button.sort")) button.addEventListener("click", () => sortBy(button.closest("th")));
  }
  filter.addEventListener("input", applyFilter);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || dialog.open || /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
    event.preventDefault();
    filter.focus();
  });
  addEventListener("hashchange", follow);
  follow();
  root.dataset.ready = "true";
})();
