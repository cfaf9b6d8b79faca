// Charts that chart.py has drawn: anew for the width there is, with zoom, values under the pointer and series to hide.
"use strict";
for (const figure of document.querySelectorAll("figure.chart[data-chart]")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg.plot"), tip = figure.querySelector(".tip");
  const reset = figure.querySelector(".reset"), whole = figure.querySelector(".whole");
  const entries = [...figure.querySelectorAll(".entry")], hidden = new Set();
  const TOP = 26, RIGHT = 16, BOTTOM = 42, COLOURS = 8, DASHES = ["", "6 4", "2 3", "8 3 2 3"];
  let view = [...data.view];            // x from, to, y from, to; decimal logarithms on a logarithmic axis
  let left, width, height;              // of the plot, in pixels

  const make = (parent, name, attributes, text) => {
    const element = document.createElementNS(svg.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const onX = (value) => data.logX ? Math.log10(value) : value;
  const onY = (value) => data.logY ? Math.log10(value) : value;
  const near = (share) => Math.min(1000, Math.max(-1000, share));  // what lies far beyond an axis is brought nearer
  const placeX = (value) => width * near((onX(value) - view[0]) / (view[1] - view[0]));
  const placeY = (value) => height * (1 - near((onY(value) - view[2]) / (view[3] - view[2])));
  const drawable = ([x, y]) => x !== null && y !== null && !(data.logX && x <= 0) && !(data.logY && y <= 0);

  // ---- ticks: the same rules as axis.py
  const superscript = (number) => [...String(number)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
  const signed = (value, text) => value < 0 ? "−" + text : text;
  function tickText(value, step) {
    if (Math.abs(value) < step * 1e-9) return "0";
    const size = Math.abs(value);
    if (size >= 1e7 || step < 1e-5) {
      const [mantissa, exponent] = size.toExponential(3).split("e");
      return signed(value, `${Number(mantissa)}·10${superscript(Number(exponent))}`);
    }
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return signed(value, size.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }));
  }
  function ticks(low, high, log, count) {
    if (log && high - low >= 1) {
      const found = [], first = Math.floor(low), decades = Math.floor(high) - first + 1;
      const stride = Math.max(1, Math.floor((high - low) / count + 0.5));
      for (let decade = first; decade < first + decades; decade++) {
        if (decade % stride) continue;
        for (const multiple of 3 * decades <= 2 * count ? [1, 2, 5] : [1]) {
          const value = multiple * 10 ** decade, place = Math.log10(value);
          if (place < low - 1e-9 || place > high + 1e-9) continue;
          const figures = multiple > 1 || (decade >= -3 && decade <= 4);
          found.push([value, figures ? tickText(value, 10 ** decade) : `10${superscript(decade)}`]);
        }
      }
      return found;
    }
    const [from, to] = log ? [10 ** low, 10 ** high] : [low, high];
    const raw = (to - from) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * (raw < 1.41 * power ? 1 : raw < 3.16 * power ? 2 : raw < 7.07 * power ? 5 : 10);
    const found = [];
    for (let n = Math.ceil(from / step - 1e-9); n <= to / step + 1e-9; n++) found.push([n * step, tickText(n * step, step)]);
    return found;
  }
  function valueText(value) {
    const size = Math.abs(value);
    if (size !== 0 && !(Number.isInteger(value) && size < 1e15) && (size < 1e-3 || size >= 1e7)) {
      const [mantissa, exponent] = size.toExponential(3).split("e");
      return signed(value, `${mantissa}·10${superscript(Number(exponent))}`);
    }
    return signed(value, size.toLocaleString("en", { maximumSignificantDigits: Math.max(5, Math.ceil(Math.log10(size + 1))) }));
  }

  function draw() {
    const total = Math.max(260, svg.parentElement.clientWidth), tall = Math.round(Math.min(380, Math.max(230, 0.56 * total)));
    const ticksX = ticks(view[0], view[1], data.logX, Math.max(3, Math.round(total / 105)));
    const ticksY = ticks(view[2], view[3], data.logY, Math.max(4, Math.round(tall / 62)));
    left = 14 + 7 * Math.max(1, ...ticksY.map(([, text]) => text.length));
    width = total - left - RIGHT;
    height = tall - TOP - BOTTOM;
    svg.setAttribute("viewBox", `0 0 ${total} ${tall}`);
    svg.replaceChildren();
    for (const [value, text] of ticksY) {
      const y = TOP + placeY(value);
      make(svg, "path", { class: "grid", d: `M${left} ${y}h${width}` });
      make(svg, "text", { class: "tick y", x: left - 8, y: y + 4 }, text);
    }
    for (const [value, text] of ticksX) {
      const x = left + placeX(value);
      make(svg, "path", { class: "grid", d: `M${x} ${TOP}v${height}` });
      make(svg, "text", { class: "tick x", x, y: TOP + height + 17 }, text);
    }
    make(svg, "path", { class: "frame", d: `M${left} ${TOP}v${height}h${width}` });
    make(svg, "text", { class: "name y", x: 0, y: 13 }, data.y);
    make(svg, "text", { class: "name x", x: left + width, y: tall - 6 }, data.x);
    const area = make(svg, "svg", { class: "area", x: left, y: TOP, width, height });
    data.series.forEach((series, number) => { if (!hidden.has(number)) drawSeries(area, series, number); });
    if (reset) reset.hidden = view.every((value, i) => value === data.view[i]);
    if (whole) whole.hidden = view.every((value, i) => value === data.whole[i]);
    tip.hidden = true;
  }
  function drawSeries(area, series, number) {
    const group = make(area, "g", { class: `s${number % COLOURS}` }), dash = DASHES[Math.floor(number / COLOURS) % 4];
    let path = "", alone = [], run = 0;
    series.points.forEach((point, i) => {
      if (!drawable(point)) { run = 0; return; }
      const x = placeX(point[0]), y = placeY(point[1]), next = series.points[i + 1];
      path += `${run ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      if (data.markers || (!run && !(next && drawable(next)))) alone.push([x, y]);
      run += 1;
      const error = series.errors[i];
      if (error !== undefined && error !== null) {
        const low = point[1] - error, bottom = data.logY && low <= 0 ? height : placeY(low);
        make(group, "path", { class: "error", d: `M${x - 3} ${placeY(point[1] + error)}h6m-3 0V${bottom}m-3 0h6` });
      }
      if (number === 0 && i < data.labels.length) {
        const start = x < 0.85 * width;
        make(group, "text",
          { class: "label", x: start ? x + 7 : x - 7, y: y - 7, "text-anchor": start ? "start" : "end" }, data.labels[i]);
      }
    });
    const line = make(group, "path", { class: "line", d: path });
    if (dash) line.setAttribute("stroke-dasharray", dash);
    for (const [x, y] of alone) make(group, "circle", { class: "dot", cx: x, cy: y, r: 3.2 });
  }

  // ---- zoom: a box by dragging, or keys; a double click or the button goes back
  const at = (event) => {
    const area = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / area.width;
    const x = (event.clientX - area.left) * scale - left, y = (event.clientY - area.top) * scale - TOP;
    return [Math.min(width, Math.max(0, x)), Math.min(height, Math.max(0, y))];
  };
  function show(wanted) {
    if (wanted[1] - wanted[0] > 1e-9 * Math.abs(wanted[1]) && wanted[3] - wanted[2] > 1e-9 * Math.abs(wanted[3])) view = wanted;
    draw();
  }
  function zoomTo([x0, y0], [x1, y1]) {
    const across = Math.abs(x1 - x0) >= 12, down = Math.abs(y1 - y0) >= 12, [a, b, c, d] = view;
    const x = (place) => a + (b - a) * place / width, y = (place) => d - (d - c) * place / height;
    show([across ? x(Math.min(x0, x1)) : a, across ? x(Math.max(x0, x1)) : b,
          down ? y(Math.max(y0, y1)) : c, down ? y(Math.min(y0, y1)) : d]);
  }
  function back() { view = [...data.view]; draw(); }
  let from = null, box = null;
  svg.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    hover(null);
    from = at(event);
    svg.setPointerCapture(event.pointerId);
    box = make(svg.querySelector(".area"), "rect", { class: "selection" });
  });
  svg.addEventListener("pointermove", (event) => {
    const to = at(event);
    if (!from) return hover(to);
    const across = Math.abs(to[0] - from[0]) >= 12, down = Math.abs(to[1] - from[1]) >= 12;
    const [x, w] = across || !down ? [Math.min(from[0], to[0]), Math.abs(to[0] - from[0])] : [0, width];
    const [y, h] = down || !across ? [Math.min(from[1], to[1]), Math.abs(to[1] - from[1])] : [0, height];
    for (const [key, value] of Object.entries({ x, y, width: w, height: h })) box.setAttribute(key, value);
  });
  svg.addEventListener("pointerup", (event) => { if (from) { const start = from; from = null; zoomTo(start, at(event)); } });
  svg.addEventListener("pointercancel", () => { from = null; draw(); });
  svg.addEventListener("pointerleave", () => { if (!from) hover(null); });
  svg.addEventListener("dblclick", back);
  svg.addEventListener("keydown", (event) => {
    const [a, b, c, d] = view, dx = (b - a) / 5, dy = (d - c) / 5;
    const wanted = {
      "+": [a + dx, b - dx, c + dy, d - dy], "-": [a - dx, b + dx, c - dy, d + dy], "0": data.view,
      ArrowLeft: [a - dx, b - dx, c, d], ArrowRight: [a + dx, b + dx, c, d],
      ArrowUp: [a, b, c + dy, d + dy], ArrowDown: [a, b, c - dy, d - dy],
    }[event.key];
    if (!wanted || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show([...wanted]);
  });
  reset.addEventListener("click", back);
  if (whole) whole.addEventListener("click", () => show([...data.whole]));
  entries.forEach((entry, number) => entry.addEventListener("click", () => {
    if (!hidden.delete(number)) hidden.add(number);
    entry.setAttribute("aria-pressed", String(!hidden.has(number)));
    draw();
  }));

  // ---- values under the pointer: of each line at the nearest x; of dots the nearest one alone
  function hover(place) {
    for (const ring of svg.querySelectorAll(".ring, .rule")) ring.remove();
    tip.hidden = true;
    if (!place) return;
    let found = [];
    data.series.forEach((series, number) => {
      if (hidden.has(number)) return;
      let best = null;
      series.points.forEach((point, i) => {
        if (!drawable(point)) return;
        const x = placeX(point[0]), y = placeY(point[1]);
        if (x < -1 || x > width + 1) return;
        const far = data.markers ? Math.hypot(x - place[0], y - place[1]) : Math.abs(x - place[0]);
        if (!best || far < best.far) best = { far, x, y, point, number, series, i };
      });
      if (best) found.push(best);
    });
    if (!found.length) return;
    const nearest = found.reduce((one, other) => other.far < one.far ? other : one);
    if (nearest.far > 60) return;
    found = data.markers ? [nearest] : found.filter((one) => Math.abs(one.x - nearest.x) < 24);
    const area = svg.querySelector(".area");
    if (!data.markers) make(area, "path", { class: "rule", d: `M${nearest.x} 0v${height}` });
    tip.replaceChildren();
    const head = tip.appendChild(document.createElement("b"));
    head.textContent = `${data.x} ${valueText(nearest.point[0])}`;
    for (const one of found) {
      make(area, "circle", { class: `ring s${one.number % COLOURS}`, cx: one.x, cy: one.y, r: 4.5 });
      const row = tip.appendChild(document.createElement("div")), error = one.series.errors[one.i];
      row.className = `s${one.number % COLOURS}`;
      const label = one.number === 0 && data.labels[one.i] ? `${one.series.label}, ${data.labels[one.i]}` : one.series.label;
      row.textContent = `${label}: ${valueText(one.point[1])}` + (error ? ` ± ${valueText(error)}` : "");
    }
    tip.hidden = false;
    const half = left + nearest.x > svg.parentElement.clientWidth / 2;
    tip.style.left = half ? "auto" : `${left + nearest.x + 12}px`;
    tip.style.right = half ? `${svg.parentElement.clientWidth - left - nearest.x + 12}px` : "auto";
    tip.style.top = `${TOP + 6}px`;
  }

  draw();
  let drawnAt = svg.parentElement.clientWidth;
  new ResizeObserver(() => {
    if (svg.parentElement.clientWidth !== drawnAt) { drawnAt = svg.parentElement.clientWidth; draw(); }
  }).observe(svg.parentElement);
}
