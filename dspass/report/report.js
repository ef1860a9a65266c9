"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);

  /** An element with text or children; nothing is ever parsed as HTML. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  const digits = (value) => {
    const size = Math.abs(value);
    return value.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
  };
  function bytes(count) {
    let value = count;
    let unit = "B";
    for (const larger of ["KB", "MB", "GB", "TB", "PB"]) {
      if (Math.abs(value) < 999.5) break;
      value /= 1000;
      unit = larger;
    }
    return unit === "B" ? `${count} B` : `${digits(value)} ${unit}`;
  }
  function seconds(value) {
    if (value === 0) return "0 s";
    for (const [factor, unit] of [[1, "s"], [1e3, "ms"]]) {
      if (Math.abs(value * factor) >= 0.9995) return `${digits(value * factor)} ${unit}`;
    }
    return `${digits(value * 1e6)} µs`;
  }

  // Theme

  const themes = ["system", "light", "dark"];
  function remembered() {
    try { return localStorage.getItem("dspass-theme"); } catch { return null; } // refused for some file: pages
  }
  function setTheme(theme) {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
    try { localStorage.setItem("dspass-theme", theme); } catch { /* it is then not remembered */ }
  }
  let theme = themes.includes(remembered()) ? remembered() : "system";
  setTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    setTheme(theme);
  });

  // Memory over the step, of one or of two timelines on the same axes

  const hidden = new Set();
  const margin = { left: 66, right: 10, top: 24, bottom: 24 };
  const chartHeight = 340;
  const charts = [];

  /** A round step that makes at most `most` ticks up to `largest`. */
  function roundStep(largest, most) {
    const unit = 10 ** Math.floor(Math.log10(Math.max(largest, 1e-12)) + 1e-9);
    const inside = largest / unit;
    const steps = [0.1, 0.2, 0.5, 1, 2, 5];
    return unit * (steps.find((step) => inside / step <= most) ?? steps[steps.length - 1]);
  }

  const shownCategories = () => data.categories.map((_, c) => c).filter((c) => !hidden.has(c));

  /** What one chart is drawn by: totals of the shown categories, and how long the timeline is. */
  function extent({ points }) {
    const count = points.t.length;
    const shown = shownCategories();
    const totals = points.t.map((_, i) => shown.reduce((sum, c) => sum + points.bytes[c][i], 0));
    const first = points.t[0];
    // The last point holds for as long as the others do on average.
    const last = points.t[count - 1] + (count > 1 ? (points.t[count - 1] - first) / (count - 1) : 1);
    return { totals, largest: totals.reduce((a, b) => Math.max(a, b), 0), span: last - first || 1 };
  }

  /** The axes of all charts: they are there to be compared. */
  function axes() {
    const extents = charts.map((chart) => extent(chart.series));
    const largest = Math.max(1, ...extents.map((e) => e.largest));
    // A budget far above all that is held would leave nothing to see.
    const budget = data.budget !== null && data.budget <= 2 * largest ? data.budget : null;
    return { extents, budget, top: Math.max(largest, budget ?? 0) * 1.06, span: Math.max(...extents.map((e) => e.span)) };
  }

  function drawCharts() {
    const { extents, ...shared } = axes();
    charts.forEach((chart, i) => chart.draw(shared, extents[i]));
  }

  /** A chart of `series` in `svg`, with `tooltip` beside it; `what` it is of, in words. */
  function makeChart(svg, tooltip, series, what) {
    const box = svg.parentElement;
    const { points } = series;
    const count = points.t.length;
    let scale = null; // of the last drawing: x(t), width, peak
    let cursor = -1;
    let cursorLine = null;
    let drawnWidth = -1;

    function shape(tag, attributes, text) {
      const element = document.createElementNS(svg.namespaceURI, tag);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      if (text !== undefined) element.textContent = text;
      svg.append(element);
      return element;
    }

    function draw({ top, span, budget }, { totals, largest, span: ownSpan }) {
      drawnWidth = box.clientWidth;
      const width = Math.max(280, drawnWidth);
      const height = chartHeight;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.replaceChildren();
      const bottom = height - margin.bottom;
      const right = width - margin.right;
      const first = points.t[0];
      const x = (t) => margin.left + ((t - first) / span) * (right - margin.left);
      const end = x(first + ownSpan);
      const shown = shownCategories();
      const y = (value) => bottom - (value / top) * (bottom - margin.top);

      let start = 0;
      let band = 0;
      for (let i = 1; i <= count; i += 1) {
        if (i < count && points.phase[i] === points.phase[start]) continue;
        const from = x(points.t[start]);
        const to = i < count ? x(points.t[i]) : end;
        if (band % 2 === 0) {
          shape("rect", { class: "band", x: from, y: 4, width: Math.max(0, to - from), height: bottom - 4 });
        }
        if (to - from > points.phase[start].length * 6.5) {
          shape("text", { x: (from + to) / 2, y: 17, "text-anchor": "middle" }, points.phase[start]);
        }
        band += 1;
        start = i;
      }

      const step = roundStep(top, 6);
      for (let value = 0; value <= top; value += step) {
        shape("line", { class: "grid", x1: margin.left, x2: right, y1: y(value), y2: y(value) });
        shape("text", { x: margin.left - 8, y: y(value) + 4, "text-anchor": "end" }, value ? bytes(value) : "0");
      }
      const timeStep = roundStep(span, Math.max(2, Math.floor(width / 130)));
      for (let t = 0; t <= span; t += timeStep) {
        const at = first + t;
        const text = data.unit === "seconds" ? seconds(t) : `${Math.round(at)}${t === 0 ? " events" : ""}`;
        const anchor = t === 0 ? "start" : x(at) > right - 24 ? "end" : "middle";
        shape("text", { x: x(at), y: bottom + 16, "text-anchor": anchor }, text);
      }

      // Bytes stay as they are until the next event, so the areas are steps.
      const low = new Array(count).fill(0);
      const pixel = (value) => value.toFixed(1);
      const ends = points.t.map((t) => pixel(x(t)));
      for (const c of shown) {
        const high = low.map((value, i) => value + points.bytes[c][i]);
        if (points.bytes[c].some((value) => value > 0)) {
          let path = `M${ends[0]} ${pixel(y(high[0]))}`;
          for (let i = 1; i < count; i += 1) path += `H${ends[i]}V${pixel(y(high[i]))}`;
          path += `H${pixel(end)}V${pixel(y(low[count - 1]))}`;
          for (let i = count - 1; i > 0; i -= 1) path += `H${ends[i]}V${pixel(y(low[i - 1]))}`;
          const area = shape("path", { class: "area", d: `${path}H${ends[0]}Z`, "data-category": data.categories[c] });
          area.style.fill = `var(--${data.categories[c]})`;
        }
        high.forEach((value, i) => { low[i] = value; });
      }

      if (budget !== null) {
        shape("line", { class: "budget", x1: margin.left, x2: right, y1: y(budget), y2: y(budget) });
        shape("text", { class: "peak-label", x: margin.left + 6, y: y(budget) - 5 }, `budget ${bytes(budget)}`);
      }

      // Of what is shown: with a category hidden, the peak may be elsewhere.
      const peak = hidden.size ? totals.indexOf(largest) : series.peak;
      const px = x(points.t[peak]);
      const py = y(totals[peak]);
      shape("line", { class: "peak-line", x1: px, x2: px, y1: py, y2: bottom });
      shape("circle", { class: "peak-dot", cx: px, cy: py, r: 4 });
      const leftwards = px > width * 0.7;
      shape("text", { class: "peak-label", x: px + (leftwards ? -9 : 9), y: py + 4, "text-anchor": leftwards ? "end" : "start" },
        `${hidden.size ? "peak of the shown" : "peak"} ${bytes(totals[peak])}`);
      cursorLine = shape("line", { class: "cursor", x1: 0, x2: 0, y1: margin.top, y2: bottom, visibility: "hidden" });
      scale = { x, width, peak };
      svg.dataset.points = count;
      svg.dataset.peak = peak;
      if (cursor >= 0) showPoint(cursor, false);
    }

    function showPoint(index, say) {
      cursor = Math.max(0, Math.min(count - 1, index));
      const at = scale.x(points.t[cursor]);
      cursorLine.setAttribute("x1", at);
      cursorLine.setAttribute("x2", at);
      cursorLine.setAttribute("visibility", "visible");
      const total = data.categories.reduce((sum, _, c) => sum + points.bytes[c][cursor], 0);
      const list = make("dl");
      data.categories.forEach((category, c) => {
        const swatch = make("span", { class: "swatch" });
        swatch.style.background = `var(--${category})`;
        list.append(swatch, make("dt", {}, category), make("dd", {}, bytes(points.bytes[c][cursor])));
      });
      list.append(make("span", { class: "total" }), make("dt", { class: "total" }, "total"),
        make("dd", { class: "total" }, bytes(total)));
      const when = data.unit === "seconds" ? `after ${seconds(points.t[cursor] - points.t[0])}` : `event ${points.t[cursor]}`;
      tooltip.replaceChildren(
        make("div", { class: "op" }, points.label[cursor]),
        make("div", { class: "muted" }, `${points.phase[cursor]}, ${when}`), list);
      tooltip.hidden = false;
      const wide = tooltip.offsetWidth;
      tooltip.style.left = `${at + 14 + wide > scale.width ? Math.max(0, at - 14 - wide) : at + 14}px`;
      if (say) byId("chart-status").textContent = `${points.label[cursor]}, ${points.phase[cursor]}: ${bytes(total)} in all`;
    }

    function hidePoint() {
      cursor = -1;
      tooltip.hidden = true;
      cursorLine?.setAttribute("visibility", "hidden");
    }

    /** The last point at or before a place on the chart. */
    function pointAt(place) {
      let low = 0;
      let high = count - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (scale.x(points.t[middle]) <= place) low = middle;
        else high = middle - 1;
      }
      return low;
    }

    svg.setAttribute("aria-label", `Stacked areas: live bytes by category${what}; ${series.peakText}`);
    new ResizeObserver(() => {
      if (box.clientWidth !== drawnWidth) drawCharts();
    }).observe(box);
    svg.addEventListener("pointermove", (event) => {
      showPoint(pointAt(event.clientX - svg.getBoundingClientRect().left), false);
    });
    svg.addEventListener("pointerleave", hidePoint);
    svg.addEventListener("blur", hidePoint);
    svg.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 20 : 1;
      const next = { ArrowLeft: cursor - far, ArrowRight: cursor + far, Home: 0, End: count - 1,
        p: scale.peak, P: scale.peak }[event.key];
      if (event.key === "Escape") hidePoint();
      if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      showPoint(next, true);
    });
    charts.push({ series, draw });
  }

  function startCharts() {
    const count = data.points.t.length;
    if (count === 0) {
      byId("chart").replaceChildren(make("p", { class: "muted absent-chart" }, `The timeline was ${data.missing}.`));
      byId("legend").hidden = true;
      byId("chart-help").hidden = true;
      return;
    }
    if (count < data.pointCount) {
      byId("timeline-note").textContent =
        `${count} of ${data.pointCount} points drawn; the highest and lowest of each interval are kept`;
    }
    data.categories.forEach((category, c) => {
      const swatch = make("span", { class: "swatch" });
      swatch.style.background = `var(--${category})`;
      const button = make("button", { type: "button", "aria-pressed": "true", title: "At the peak; click to hide or show" },
        swatch, category, make("span", { class: "count" }, bytes(data.points.bytes[c][data.peak])));
      button.addEventListener("click", () => {
        if (!hidden.delete(c)) hidden.add(c);
        button.setAttribute("aria-pressed", String(!hidden.has(c)));
        drawCharts();
      });
      byId("legend").append(button);
    });
    if (data.unplanned) {
      byId("chart-title").hidden = false;
      byId("without").hidden = false;
    }
    makeChart(byId("svg"), byId("tooltip"), data, data.unplanned ? " with the plan" : "");
    if (data.unplanned) {
      makeChart(byId("svg-without"), byId("without").querySelector(".tooltip"), data.unplanned, " without the plan");
    }
    drawCharts();
  }

  // Passes

  const context = 3;
  const chunk = 800; // rows added to the page at once
  const [equal, renamed] = [0, 1]; // tags of the differences; 2 is a change without a counterpart
  let opened = null; // what the right side shows

  function* operations(diff) {
    for (let i = 0; i < diff.ops.length; i += 5) yield diff.ops.slice(i, i + 5);
  }

  function tally(diff) {
    let [added, removed] = [0, 0];
    for (const [tag, i0, i1, j0, j1] of operations(diff)) {
      if (tag !== equal) {
        removed += i1 - i0;
        added += j1 - j0;
      }
    }
    return { added, removed };
  }

  /** Rows as [tag, line before or -1, line after or -1, number of the change]; equal lines as [equal, i, j, -1]. */
  function rowsOf(diff) {
    const rows = [];
    let change = -1;
    let inside = false;
    for (const [tag, i0, i1, j0, j1] of operations(diff)) {
      if (tag === equal) inside = false;
      else if (!inside) {
        inside = true;
        change += 1;
      }
      for (let k = 0; k < Math.max(i1 - i0, j1 - j0); k += 1) {
        rows.push([tag, i0 + k < i1 ? i0 + k : -1, j0 + k < j1 ? j0 + k : -1, tag === equal ? -1 : change]);
      }
    }
    return { rows, changes: change + 1 };
  }

  /** Ranges of rows, each shown or folded away. */
  function fold(rows, everything) {
    if (everything) return [{ from: 0, to: rows.length, folded: false }];
    const near = new Uint8Array(rows.length);
    rows.forEach((row, r) => {
      if (row[0] !== equal) near.fill(1, Math.max(0, r - context), Math.min(rows.length, r + context + 1));
    });
    const parts = [];
    for (let r = 0; r < rows.length;) {
      let end = r + 1;
      while (end < rows.length && near[end] === near[r]) end += 1;
      // A button that hides two lines saves nothing.
      const folded = near[r] === 0 && end - r > 2;
      const before = parts[parts.length - 1];
      if (before && !folded && !before.folded) before.to = end;
      else parts.push({ from: r, to: end, folded });
      r = end;
    }
    return parts;
  }

  /** A line with the part marked in which it differs from its counterpart. */
  function cell(kind, text, other) {
    const box = make("td", { class: kind });
    if (other === null || kind === "") {
      box.append(text);
      return box;
    }
    let head = 0;
    while (head < text.length && head < other.length && text[head] === other[head]) head += 1;
    let tail = 0;
    while (tail < Math.min(text.length, other.length) - head &&
      text[text.length - 1 - tail] === other[other.length - 1 - tail]) tail += 1;
    const middle = text.slice(head, text.length - tail);
    box.append(text.slice(0, head));
    if (middle) box.append(make("mark", {}, middle));
    box.append(text.slice(text.length - tail));
    return box;
  }

  function rowElement(diff, [tag, i, j, change]) {
    const before = i < 0 ? null : data.lines[data.texts[diff.before][i]];
    const after = j < 0 ? null : data.lines[data.texts[diff.after][j]];
    const pair = tag === renamed;
    return make("tr", { "data-change": change < 0 ? null : change },
      make("td", { class: "no" }, i < 0 ? "" : String(i + 1)),
      before === null ? make("td", { class: "void" }) : cell(tag === equal ? "" : "del", before, pair ? after : null),
      make("td", { class: "no" }, j < 0 ? "" : String(j + 1)),
      after === null ? make("td", { class: "void" }) : cell(tag === equal ? "" : "add", after, pair ? before : null));
  }

  function buttonRow(text, action) {
    const button = make("button", { type: "button" }, text);
    const row = make("tr", { class: "gap" }, make("td", { colspan: "4" }, button));
    button.addEventListener("click", () => action(row));
    return row;
  }

  /** Rows from..to in place of `row`, at most a chunk of them and then a button for the rest. */
  function fill(diff, rows, from, to, row, upTo = chunk) {
    const stop = Math.min(to, from + upTo);
    const fresh = document.createDocumentFragment();
    for (let r = from; r < stop; r += 1) fresh.append(rowElement(diff, rows[r]));
    if (stop < to) {
      const left = to - stop;
      fresh.append(buttonRow(`Show ${left > chunk ? `${chunk} of the next ${left}` : `the next ${left}`} lines`,
        (again) => fill(diff, rows, stop, to, again)));
    }
    const focus = row.contains(document.activeElement);
    const next = fresh.querySelector("button");
    row.replaceWith(fresh);
    if (focus) (next ?? byId("pass").querySelector(".diff-box")).focus();
  }

  function drawDiff(everything) {
    const { diff } = opened;
    const { rows, changes } = opened.rows ?? (opened.rows = rowsOf(diff));
    const body = make("tbody");
    let budget = chunk;
    const parts = fold(rows, everything);
    const add = (list) => {
      list.forEach((part, at) => {
        if (part.folded) {
          body.append(buttonRow(`${part.to - part.from} equal lines`, (row) => fill(diff, rows, part.from, part.to, row)));
          return;
        }
        if (budget <= 0) return;
        const place = make("tr");
        body.append(place);
        fill(diff, rows, part.from, part.to, place, budget);
        budget -= part.to - part.from;
        const rest = list.slice(at + 1);
        if (budget <= 0 && rest.length) {
          body.append(buttonRow("Show more changes", (row) => {
            row.remove();
            budget = chunk;
            add(rest);
          }));
          list.length = at + 1; // what follows is behind that button
        }
      });
    };
    add(parts);
    const columns = ["no", "", "no", ""].map((name) => make("col", { class: name || null }));
    const table = make("table", { class: "diff" }, make("colgroup", {}, ...columns),
      make("thead", {}, make("tr", {}, make("th", { colspan: "2", scope: "col" }, "Before"),
        make("th", { colspan: "2", scope: "col" }, "After"))), body);
    const box = byId("pass").querySelector(".diff-box");
    box.replaceChildren(table);
    box.scrollTop = 0;
    opened.changes = changes;
    opened.at = -1;
    markTarget();
  }

  function markTarget() {
    const box = byId("pass").querySelector(".diff-box");
    box.querySelectorAll(".target").forEach((row) => row.classList.remove("target"));
    const [back, forth] = byId("pass").querySelectorAll(".tools button");
    back.disabled = opened.at <= 0;
    forth.disabled = opened.at >= opened.changes - 1;
    byId("pass").querySelector(".position").textContent =
      opened.at >= 0 ? `change ${opened.at + 1} of ${opened.changes}`
        : opened.changes === 1 ? "1 change" : `${opened.changes || "no"} changes`;
  }

  function go(by) {
    const box = byId("pass").querySelector(".diff-box");
    const target = Math.max(0, opened.at + by);
    let row = box.querySelector(`[data-change="${target}"]`);
    while (!row) { // not yet on the page
      const more = [...box.querySelectorAll(".gap button")].find((b) => b.textContent.startsWith("Show"));
      if (!more) return;
      more.click();
      row = box.querySelector(`[data-change="${target}"]`);
    }
    opened.at = target;
    markTarget();
    row.classList.add("target");
    box.scrollTop += row.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
  }

  function open(entry, button) {
    byId("pass-list").querySelectorAll("[aria-current]").forEach((b) => b.removeAttribute("aria-current"));
    button.setAttribute("aria-current", "true");
    opened = { diff: data.diffs[entry.diff] };
    const head = make("div", { class: "pass-head" },
      make("div", {}, make("h3", {}, entry.title), make("p", {}, entry.summary), make("p", { class: "muted small" }, entry.facts)));
    const panel = byId("pass");
    if (opened.diff.empty) {
      panel.replaceChildren(head, make("p", { class: "muted" }, "The text of this graph was not kept."));
      return;
    }
    const { added, removed } = tally(opened.diff);
    const all = make("input", { type: "checkbox" });
    all.addEventListener("change", () => drawDiff(all.checked));
    const back = make("button", { type: "button" }, "Previous");
    const forth = make("button", { type: "button" }, "Next");
    back.addEventListener("click", () => go(-1));
    forth.addEventListener("click", () => go(1));
    head.append(make("div", { class: "tools" },
      make("span", { class: "minus" }, `-${removed}`), make("span", { class: "plus" }, `+${added}`),
      make("span", { class: "position muted" }), back, forth, make("label", {}, all, "all lines")));
    panel.replaceChildren(head,
      make("div", { class: "diff-box", tabindex: "0", role: "region", "aria-label": `Graph before and after ${entry.title}` }));
    drawDiff(false);
  }

  function startPasses() {
    const list = byId("pass-list");
    const buttons = [];
    let group = null;
    let items = null;
    for (const entry of data.entries) {
      if (entry.group !== group) {
        group = entry.group;
        items = make("ol");
        list.append(make("h3", {}, group), items);
      }
      const button = make("button", { type: "button", class: entry.changed ? "" : "idle", "data-pass": entry.pass ? "" : null },
        make("span", { class: "name" }, entry.title),
        make("span", { class: "ops" }, entry.ops),
        make("span", { class: "meta" }, entry.meta,
          ...(entry.keeps ? [] : [" ", make("span", { class: "numbers" }, "changes numbers")])));
      button.addEventListener("click", () => open(entry, button));
      buttons.push(button);
      items.append(make("li", {}, button));
    }
    if (buttons.length === 0) {
      byId("pass").parentElement.hidden = true; // the heading says that none ran
      return;
    }
    list.addEventListener("keydown", (event) => {
      const at = buttons.indexOf(document.activeElement);
      const next = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (at < 0 || next === undefined || !buttons[next]) return;
      event.preventDefault();
      buttons[next].focus();
      buttons[next].click();
    });
    const first = data.entries.findIndex((entry) => entry.pass && entry.changed);
    open(data.entries[Math.max(0, first)], buttons[Math.max(0, first)]);
  }

  try {
    startCharts();
    startPasses();
    root.dataset.ready = "yes";
  } catch (error) {
    const failure = byId("failure");
    failure.hidden = false;
    failure.textContent = `A part of this page could not be drawn: ${error.message}`;
    throw error; // the handler in the head keeps it for tests
  }
})();
