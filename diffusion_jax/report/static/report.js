"use strict";
// Draws the charts with uPlot, and steps through the pictures. Each element holds its data as JSON.
(() => {
  const HEIGHT = 240;
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColor = (i) => color(`--s${i % 8}`);
  const format = (value) => {
    if (value === null || value === undefined) return "no value";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(3) : String(+value.toPrecision(5));
  };

  // One table [x, mean, low, high, mean, low, high, ...] of all series of a chart; null where a series has no value.
  const join = (series) =>
    uPlot.join(series.map((one) => [one.x, one.mean, one.low || one.mean, one.high || one.mean]));

  const positive = (table) => table.slice(1).every((values) => values.every((value) => value === null || value === undefined || value > 0));

  class Chart {
    constructor(place, chart) {
      this.chart = chart;
      this.place = place;
      this.table = join(chart.series);
      this.canBeLog = positive(this.table);
      this.isLog = chart.log && this.canBeLog;
      this.shown = chart.series.map(() => true);
      this.range = null;
      this.plotElement = make("div", { className: "plot", tabIndex: 0 });
      this.plotElement.setAttribute("role", "img");
      const names = chart.series.map((one) => one.label).join(", ");
      this.plotElement.setAttribute(
        "aria-label",
        `Chart: ${chart.title}, ${chart.y} against ${chart.x}. Lines: ${names}. Left and right move the cursor, plus and ` +
          "minus zoom, 0 shows everything.",
      );
      this.status = make("p", { className: "axis-x" }, chart.x);
      this.status.setAttribute("aria-live", "polite");
      this.values = make("ul", { className: "values" });
      place.append(this.makeButtons(), this.plotElement, this.status, this.values);
      this.makeValues();
      this.plotElement.addEventListener("keydown", (event) => this.onKey(event));
      this.draw();
    }

    makeButtons() {
      const button = (text, label, action) => {
        const element = make("button", { type: "button", onclick: action }, text);
        element.setAttribute("aria-label", `${this.chart.title}: ${label}`);
        return element;
      };
      const buttons = [
        button("+", "zoom in", () => this.zoom(0.5)),
        button("−", "zoom out", () => this.zoom(2)),
        button("all", "show everything", () => this.show(null)),
      ];
      if (this.canBeLog) {
        const log = button("log", "logarithmic axis", () => {
          this.isLog = !this.isLog;
          log.setAttribute("aria-pressed", String(this.isLog));
          this.draw();
        });
        log.setAttribute("aria-pressed", String(this.isLog));
        buttons.push(log);
      }
      return make("div", { className: "controls chart-buttons" }, ...buttons);
    }

    makeValues() {
      this.outputs = this.chart.series.map((one, i) => {
        const swatch = make("span", { className: "swatch" });
        const value = make("span");
        const button = make("button", { type: "button" }, swatch, `${one.label} `, value);
        button.setAttribute("aria-pressed", "true");
        button.onclick = () => {
          this.shown[i] = !this.shown[i];
          button.setAttribute("aria-pressed", String(this.shown[i]));
          this.draw();
        };
        this.values.append(make("li", {}, button));
        return { swatch, value };
      });
    }

    options() {
      const { chart } = this;
      const axis = { stroke: color("--text"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
      const lines = chart.series.flatMap((one, i) => {
        const common = { show: this.shown[i], spanGaps: true };
        const bound = { ...common, stroke: "transparent", width: 0, points: { show: false } };
        const line = { ...common, stroke: seriesColor(i), width: 1.6, points: { show: one.x.length < 40, size: 5 } };
        return [line, bound, bound];
      });
      const fill = (i) => `${seriesColor(i)}33`;
      return {
        width: Math.max(this.plotElement.clientWidth, 200),
        height: HEIGHT,
        legend: { show: false },
        cursor: { drag: { x: true, y: false, setScale: true } },
        scales: {
          x: { time: false },
          y: { distr: this.isLog ? 3 : 1 },
        },
        axes: [
          { ...axis, size: 34, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) },
          {
            ...axis,
            size: 62,
            label: chart.y,
            labelSize: 20,
            labelFont: "12px system-ui, sans-serif",
            values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))),
          },
        ],
        series: [{}, ...lines],
        bands: chart.series.map((_, i) => ({ series: [3 * i + 3, 3 * i + 2], fill: fill(i), show: this.shown[i] })),
        hooks: {
          setCursor: [() => this.onCursor()],
          setScale: [(plot, key) => key === "x" && (this.range = [plot.scales.x.min, plot.scales.x.max])],
        },
      };
    }

    draw() {
      const range = this.range;
      if (this.plot) this.plot.destroy();
      this.outputs.forEach(({ swatch }, i) => (swatch.style.background = seriesColor(i)));
      this.plot = new uPlot(this.options(), this.table, this.plotElement);
      if (range && range[0] !== null) this.plot.setScale("x", { min: range[0], max: range[1] });
      this.onCursor();
    }

    resize() {
      this.plot.setSize({ width: Math.max(this.plotElement.clientWidth, 200), height: HEIGHT });
    }

    onCursor() {
      if (!this.plot) return;
      const { idx } = this.plot.cursor;
      const at = idx === null || idx === undefined ? null : idx;
      this.chart.series.forEach((one, i) => {
        const [mean, low, high] = [1, 2, 3].map((j) => (at === null ? null : this.table[3 * i + j][at]));
        const bounds = one.low && low !== null && low !== undefined ? ` (${format(low)} to ${format(high)})` : "";
        this.outputs[i].value.textContent = at === null ? "" : `${format(mean)}${bounds}`;
      });
      this.status.textContent = at === null ? this.chart.x : `${this.chart.x}: ${format(this.table[0][at])}`;
    }

    moveCursor(change) {
      const x = this.table[0];
      const { min, max } = this.plot.scales.x;
      const last = x.length - 1;
      const start = this.plot.cursor.idx ?? (change > 0 ? -1 : last + 1);
      const first = x.findIndex((value) => value >= min);
      const end = last - [...x].reverse().findIndex((value) => value <= max);
      const index = Math.min(Math.max(start + change, first), end);
      const left = this.plot.valToPos(x[index], "x");
      const value = this.table[1][index];
      this.plot.setCursor({ left, top: value === null || value === undefined ? 5 : this.plot.valToPos(value, "y") });
    }

    zoom(factor) {
      const { min, max } = this.plot.scales.x;
      const x = this.table[0];
      const { idx } = this.plot.cursor;
      const center = idx === null || idx === undefined ? (min + max) / 2 : x[idx];
      const half = ((max - min) / 2) * factor;
      const low = Math.max(center - half, x[0]);
      const high = Math.min(center + half, x[x.length - 1]);
      if (high > low) this.show([low, high]);
    }

    show(range) {
      const x = this.table[0];
      const [min, max] = range || [x[0], x[x.length - 1]];
      this.plot.setScale("x", { min, max });
    }

    onKey(event) {
      const step = event.shiftKey ? 10 : 1;
      const actions = {
        ArrowLeft: () => this.moveCursor(-step),
        ArrowRight: () => this.moveCursor(step),
        Home: () => this.moveCursor(-Infinity),
        End: () => this.moveCursor(Infinity),
        "+": () => this.zoom(0.5),
        "=": () => this.zoom(0.5),
        "-": () => this.zoom(2),
        0: () => this.show(null),
      };
      if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      actions[event.key]();
    }
  }

  const short = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return size < 1e-3 ? value.toExponential(0) : String(+value.toPrecision(4));
  };

  // Pictures with a slider.
  const startFrames = (place, frames) => {
    const images = [...place.querySelectorAll("img")];
    const first = images.map((image) => image.getAttribute("src"));
    const caption = place.querySelector(".frame-caption");
    const slider = place.querySelector("input");
    const play = place.querySelector("[data-play]");
    const count = frames.captions.length;
    let timer = null;
    const show = (index) => {
      const wrapped = (index + count) % count;
      slider.value = wrapped;
      slider.setAttribute("aria-valuetext", frames.captions[wrapped]);
      caption.textContent = `${frames.captions[wrapped]} (${wrapped + 1} of ${count})`;
      images.forEach((image, i) => {
        image.src = frames.images[wrapped][i] || first[i];
        image.alt = `${frames.names[i]}, ${frames.captions[wrapped]}`;
      });
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
      caption.setAttribute("aria-live", "polite");
    };
    slider.addEventListener("input", () => show(Number(slider.value)));
    for (const button of place.querySelectorAll("[data-move]")) {
      button.addEventListener("click", () => show(Number(slider.value) + Number(button.dataset.move)));
    }
    play.addEventListener("click", () => {
      if (timer) return stop();
      play.textContent = "Stop";
      play.setAttribute("aria-pressed", "true");
      caption.setAttribute("aria-live", "off");
      timer = setInterval(() => show(Number(slider.value) + 1), 600);
    });
    show(frames.start);
  };

  const charts = [];
  const read = (place) => JSON.parse(place.querySelector("script").textContent);
  for (const place of document.querySelectorAll(".chart")) charts.push(new Chart(place, read(place)));
  for (const place of document.querySelectorAll(".frames")) startFrames(place, read(place));

  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    charts.forEach((chart) => chart.resize());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.draw()));
})();
