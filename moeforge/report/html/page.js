"use strict";
// Draws heat maps and the routing of a text from the JSON in the page. Whatever came from files is put in as text, never as HTML.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // cividis (Nunez, Anderton, Renslow 2018): lightness alone tells values apart, whatever colours an eye sees
  const PLAIN = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  // blue against orange, the middle close to the page
  const AROUND = { light: ["#1d4e89", "#5b8fc7", "#b4cfe7", "#f4f4f4", "#f6c99b", "#dd8a3c", "#9c4a00"],
                  dark: ["#8cc4ff", "#4f8fca", "#2c4a66", "#24272b", "#6b4a22", "#c47c2c", "#ffc16b"] };
  // behind text: from the page to blue
  const TEXT = { light: ["#f2f6fa", "#c3d9ee", "#7fb0da", "#3d7fbf", "#134a86"], dark: ["#20252b", "#294a6b", "#3b78ad", "#6cb2ee", "#b9ddff"] };
  const redraws = [];

  function el(name, attributes, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) if (value !== null) made.setAttribute(key, value);
    made.append(...children.map((child) => (child instanceof Node ? child : document.createTextNode(String(child)))));
    return made;
  }

  function choice(label, options, changed) {
    const select = el("select", {}, ...options.map(([value, text]) => el("option", { value }, text)));
    select.addEventListener("change", changed);
    return [el("label", {}, `${label} `, select), select];
  }

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  function mixed(stops, share) {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
    return a.map((value, k) => Math.round(value + (b[k] - value) * (at - low)));
  }

  const css = ([r, g, b]) => `rgb(${r}, ${g}, ${b})`;

  // WCAG's relative luminance, for text that can be read on its colour
  function inkOn(colour) {
    const [r, g, b] = colour.map((value) => (value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  }

  function stopsOf(scale) {
    const mode = dark.matches ? "dark" : "light";
    return scale.kind === "ratio" || scale.kind === "even" ? AROUND[mode] : scale.kind === "text" ? TEXT[mode] : PLAIN;
  }

  function shareOf(scale, value) {
    if (scale.kind === "even") return value <= 1 ? value / 2 : 0.5 + (value - 1) / (scale.high - 1) / 2;
    if (scale.kind !== "ratio") return (value - scale.low) / (scale.high - scale.low || 1);
    return value > 0 ? 0.5 + Math.log(value) / Math.log(scale.high) / 2 : 0;
  }

  const told = (value) => (value === null || value === undefined ? "no value" : String(Number(value.toPrecision(3))));

  function ramp(scale) {
    const ticks = scale.kind === "ratio"
      ? [`≤ ${told(1 / scale.high)}`, ...[1 / Math.sqrt(scale.high), 1, Math.sqrt(scale.high)].filter((tick) => scale.high > 2 || tick === 1).map(told),
         `≥ ${told(scale.high)}`]
      : (scale.kind === "even" ? [0, 1, scale.high] : [scale.low, (scale.low + scale.high) / 2, scale.high]).map(told);
    if (scale.clipped) ticks.push(`≥ ${ticks.pop()}`);
    const strip = el("i", {});
    const paint = () => { strip.style.background = `linear-gradient(90deg, ${stopsOf(scale).join(", ")})`; };
    redraws.push(paint);
    paint();
    return el("div", { class: "ramp" }, el("span", {}, scale.label), strip,
              el("span", { class: "ticks" }, ...ticks.map((tick) => el("span", {}, tick + scale.unit))));
  }

  function heat(figure) {
    const spec = JSON.parse(document.getElementById(figure.dataset.from).textContent);
    const { maps } = spec;
    let map = maps[0];
    const scaleOf = () => ({ ...spec.scale, high: map.high === null ? spec.scale.high : map.high });
    let scale = scaleOf();
    const legend = el("div", {}, ramp(scale));
    let cursor = null;
    let box = null; // where the cells lie: {left, top, width, height} of one cell and counts
    const canvas = el("canvas", { tabindex: "0", role: "application", "aria-roledescription": "heat map" });
    const holder = el("div", { class: "canvas" }, canvas);
    const readout = el("output", { "aria-live": "polite" });
    const numbers = el("details", {}, el("summary", {}, "all numbers of this map"));
    const [label, select] = choice(spec.choice, maps.map((one, at) => [at, one.title]), () => {
      map = maps[Number(select.value)];
      scale = scaleOf();
      legend.replaceChildren(ramp(scale));
      cursor = null;
      fill();
      draw();
    });
    if (maps.length > 1) figure.append(el("div", { class: "controls" }, label));
    figure.append(legend, holder, readout, numbers);

    const columnsOf = () => map.values.reduce((most, row) => Math.max(most, row.length), 0);
    const rowName = () => (map.title.includes("expert by expert") ? "expert" : spec.row);
    const columnName = (c) => (map.columns ? map.columns[c] : `${spec.column} ${c}`);

    function draw() {
      const context = canvas.getContext("2d");
      const style = getComputedStyle(figure);
      const [rows, columns] = [map.values.length, columnsOf()];
      const font = "12px system-ui, sans-serif";
      context.font = font;
      const widest = (texts) => Math.max(0, ...texts.map((text) => context.measureText(text).width));
      const left = Math.ceil(widest(map.rows)) + 34;
      const names = map.columns || [];
      const room = Math.max(holder.clientWidth - 6, 120) - left - 4;
      const width = Math.max(map.columns ? 26 : 6, Math.min(map.columns ? 130 : 56, Math.floor(room / Math.max(columns, 1))));
      const height = rows <= 12 ? 26 : rows <= 60 ? 16 : 9;
      const slanted = names.length > 0 && widest(names) > width - 6;
      const bottom = slanted ? Math.ceil(widest(names) * 0.71) + 34 : 40;
      const [full, tall] = [left + columns * width + 4, rows * height + 4 + bottom];
      const sharp = window.devicePixelRatio || 1;
      canvas.width = Math.round(full * sharp);
      canvas.height = Math.round(tall * sharp);
      canvas.style.width = `${full}px`;
      canvas.style.height = `${tall}px`;
      context.scale(sharp, sharp);
      context.font = font;
      box = { left, top: 4, width, height, rows, columns };
      const stops = stopsOf(scale);
      map.values.forEach((row, r) => row.forEach((value, c) => {
        const [x, y] = [left + c * width, 4 + r * height];
        if (value === null) {
          context.strokeStyle = style.getPropertyValue("--rule");
          context.strokeRect(x + 1.5, y + 1.5, width - 3, height - 3);
          return;
        }
        const colour = mixed(stops, shareOf(scale, value));
        context.fillStyle = css(colour);
        context.fillRect(x, y, width - (width > 8 ? 1 : 0), height - (height > 10 ? 1 : 0));
        if (width >= 38 && height >= 14) {
          context.fillStyle = inkOn(colour);
          context.textAlign = "center";
          context.textBaseline = "middle";
          context.fillText(told(value), x + width / 2, y + height / 2);
        }
      }));
      context.fillStyle = style.getPropertyValue("--quiet");
      context.textBaseline = "middle";
      context.textAlign = "right";
      const skip = Math.ceil(13 / height);
      map.rows.forEach((name, r) => { if (r % skip === 0) context.fillText(name, left - 6, 4 + (r + 0.5) * height); });
      const under = 4 + rows * height;
      const each = [1, 2, 5, 10, 20, 50, 100, 200].find((step) => step * width >= 24) || 500;
      for (let c = 0; c < columns; c += map.columns ? 1 : each) {
        const x = left + (c + 0.5) * width;
        context.save();
        context.translate(x, under + 12);
        context.textAlign = slanted ? "right" : "center";
        if (slanted) context.rotate(-Math.PI / 4);
        context.fillText(map.columns ? map.columns[c] : c, 0, 0);
        context.restore();
      }
      context.textAlign = "center";
      context.fillStyle = style.getPropertyValue("--ink");
      context.fillText(map.columns ? "" : spec.column, left + columns * width / 2, tall - 8);
      context.save();
      context.translate(9, under / 2 + 2);
      context.rotate(-Math.PI / 2);
      context.fillText(rowName(), 0, 0);
      context.restore();
      if (cursor) {
        const [x, y] = [left + cursor[1] * width, 4 + cursor[0] * height];
        context.lineWidth = 3;
        context.strokeStyle = style.getPropertyValue("--back");
        context.strokeRect(x - 2, y - 2, width + 3, height + 3);
        context.lineWidth = 2;
        context.strokeStyle = style.getPropertyValue("--focus");
        context.strokeRect(x - 1, y - 1, width + 1, height + 1);
      }
      canvas.setAttribute("aria-label", `${map.title}: ${scale.label}, ${rows} rows by ${columns} columns. Arrow keys move from cell to cell.`);
      readout.textContent = cursor ? sentence() : "Point at a cell, or focus the map and use the arrow keys, for its number.";
    }

    function sentence() {
      const [r, c] = cursor;
      return `${rowName()} ${map.rows[r]}, ${columnName(c)}: ${told(map.values[r][c])}${scale.unit} (${scale.label})`;
    }

    function move(r, c) {
      if (!box || !box.rows) return;
      const row = Math.min(Math.max(r, 0), box.rows - 1);
      const length = map.values[row].length;
      if (!length) { cursor = null; draw(); return; }
      const next = [row, Math.min(Math.max(c, 0), length - 1)];
      if (cursor && cursor[0] === next[0] && cursor[1] === next[1]) return;
      cursor = next;
      draw();
    }

    canvas.addEventListener("mousemove", (event) => {
      const place = canvas.getBoundingClientRect();
      const r = Math.floor((event.clientY - place.top - box.top) / box.height);
      const c = Math.floor((event.clientX - place.left - box.left) / box.width);
      if (r >= 0 && r < box.rows && c >= 0 && c < map.values[r].length) move(r, c);
    });
    canvas.addEventListener("focus", () => { if (!cursor) move(0, 0); });
    canvas.addEventListener("keydown", (event) => {
      const [r, c] = cursor || [0, 0];
      const goal = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
                     Home: [r, 0], End: [r, Infinity], PageUp: [0, c], PageDown: [Infinity, c] }[event.key];
      if (!goal) return;
      event.preventDefault();
      move(...goal);
    });

    function fill() {
      if (!numbers.open) { numbers.querySelectorAll("div").forEach((old) => old.remove()); return; }
      const head = Array.from({ length: columnsOf() }, (_, c) => el("th", { scope: "col", class: "number" }, map.columns ? map.columns[c] : c));
      const body = map.values.map((row, r) => el("tr", {}, el("th", { scope: "row" }, map.rows[r]),
        ...row.map((value) => el("td", { class: "number" }, value === null ? "–" : told(value)))));
      const table = el("table", {}, el("caption", {}, `${map.title}: ${scale.label}`),
                       el("thead", {}, el("tr", {}, el("th", { scope: "col" }, rowName()), ...head)), el("tbody", {}, ...body));
      numbers.querySelectorAll("div").forEach((old) => old.remove());
      numbers.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": map.title }, table));
    }
    numbers.addEventListener("toggle", fill);
    redraws.push(draw);
    new ResizeObserver(draw).observe(holder);
    draw();
  }

  function route(figure) {
    const spec = JSON.parse(document.getElementById(figure.dataset.from).textContent);
    const scale = { kind: "text", low: 0, high: 1000 };
    let here = 0;
    const [layerLabel, layer] = choice("layer", spec.sites.map((name, at) => [at, name]), () => { experts(); paint(); });
    const [expertLabel, expert] = choice("expert", [["", "the heaviest"]], paint);
    const text = el("div", { class: "text", role: "listbox", tabindex: "0", "aria-label": "tokens" });
    const panel = el("div", { "aria-live": "polite" });
    figure.append(el("div", { class: "controls" }, layerLabel, expertLabel),
                  ramp({ kind: "text", low: 0, high: 1, label: "weight of the expert", unit: "" }),
                  el("div", { class: "reading" }, text, panel));
    const marks = spec.tokens.map((piece, at) => {
      const shown = piece.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));
      // empty: one more token of the character before it
      const mark = el("span", { class: "token", role: "option", id: `token-${at}`, "aria-selected": "false" }, el("b", {}, shown || "⋯"), el("small", {}));
      mark.addEventListener("mouseenter", () => show(at));
      mark.addEventListener("click", () => show(at));
      text.append(mark);
      if (piece.includes("\n")) text.append(el("br"));
      return mark;
    });

    function experts() {
      const kept = expert.value;
      const count = spec.counts[Number(layer.value)];
      expert.replaceChildren(el("option", { value: "" }, "the heaviest"),
                             ...Array.from({ length: count }, (_, e) => el("option", { value: e }, `expert ${e}`)));
      expert.value = kept !== "" && Number(kept) < count ? kept : "";
    }

    function paint() {
      const rows = spec.routes[Number(layer.value)];
      marks.forEach((mark, at) => {
        const chosen = rows[at];
        let weight = chosen.length ? chosen[1] : 0;
        if (expert.value !== "") {
          weight = 0;
          for (let k = 0; k < chosen.length; k += 2) if (chosen[k] === Number(expert.value)) weight += chosen[k + 1];
        }
        const colour = mixed(stopsOf(scale), shareOf(scale, weight));
        mark.firstChild.style.background = css(colour);
        mark.firstChild.style.color = inkOn(colour);
        mark.lastChild.textContent = chosen.length ? chosen[0] : "–";
      });
    }

    function show(at) {
      here = Math.min(Math.max(at, 0), marks.length - 1);
      text.querySelectorAll(".here").forEach((old) => { old.classList.remove("here"); old.setAttribute("aria-selected", "false"); });
      marks[here].classList.add("here");
      marks[here].setAttribute("aria-selected", "true");
      text.setAttribute("aria-activedescendant", `token-${here}`);
      const rows = spec.sites.map((name, at) => {
        const chosen = spec.routes[at][here];
        const chips = [];
        for (let k = 0; k < chosen.length; k += 2) {
          const fill = el("i", {});
          fill.style.width = `${Math.min(chosen[k + 1] / 10, 100)}%`;
          chips.push(el("span", { class: "chip" }, fill, el("span", {}, `${chosen[k]}: ${(chosen[k + 1] / 1000).toFixed(3)}`)));
        }
        return el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, el("div", { class: "chips" }, ...(chips.length ? chips : ["no expert"]))));
      });
      const caption = `Token ${here}, ${JSON.stringify(spec.tokens[here])} (id ${spec.ids[here]}): experts and their weights, layer by layer`;
      const table = el("table", {}, el("caption", {}, caption), el("tbody", {}, ...rows));
      panel.replaceChildren(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "experts of the token" }, table));
    }

    text.addEventListener("keydown", (event) => {
      const goal = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: marks.length - 1 }[event.key];
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (goal === undefined && step === undefined) return;
      event.preventDefault();
      if (goal !== undefined) {
        show(goal);
        marks[here].scrollIntoView({ block: "nearest" });
        return;
      }
      layer.value = String(Math.min(Math.max(Number(layer.value) + step, 0), spec.sites.length - 1));
      experts();
      paint();
    });
    redraws.push(paint);
    experts();
    paint();
    show(0);
  }

  dark.addEventListener("change", () => redraws.forEach((draw) => draw()));
  document.querySelectorAll("figure.heat").forEach(heat);
  document.querySelectorAll("figure.tokens").forEach(route);
})();
