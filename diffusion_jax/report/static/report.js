"use strict";
// Draws the report that the page holds as JSON: text, tables, pictures, and curves with uPlot. A text of the report is always
// inserted as text, never as HTML.
(() => {
  const HEIGHT = 230;
  const make = (name, properties = {}, ...children) => {
    const { aria = {}, ...others } = properties;
    const element = Object.assign(document.createElement(name), others);
    for (const [key, value] of Object.entries(aria)) element.setAttribute(`aria-${key}`, value);
    element.append(...children);
    return element;
  };
  const button = (text, onclick) => make("button", { type: "button", onclick }, text);
  const isNumber = (value) => value !== null && value !== undefined;
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const seriesColor = (i) => color(`--s${i % 8}`);
  const format = (value) => {
    if (!isNumber(value)) return "no value";
    if (Number.isInteger(value)) return value.toLocaleString("en");
    return Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 ? value.toExponential(3) : String(+value.toPrecision(5));
  };
  const short = (value) => {
    const size = Math.abs(value);
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
    return String(+value.toPrecision(4));
  };

  // ---- Curves

  const view = { axis: "step", smoothing: 0, range: null, charts: [] };
  let data = { runs: [], charts: [] };

  // The wall time of training at a step, by linear interpolation.
  const seconds = (run, step) => {
    const { steps, seconds: times } = run;
    const after = steps.findIndex((other) => other >= step);
    if (after <= 0) return after ? times[times.length - 1] : times[0];
    const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
    return times[after - 1] + share * (times[after] - times[after - 1]);
  };
  const AXES = {
    step: { title: () => "training step", can: () => true, of: (run, step) => step },
    examples: { title: () => "training examples", can: (run) => run.batch, of: (run, step) => step * run.batch },
    time: {
      title: () => `training time (${timeUnit()[0]})`,
      can: (run) => run.steps.length > 1,
      of: (run, step) => seconds(run, step) / timeUnit()[1],
    },
  };
  const timeUnit = () => {
    const longest = Math.max(...data.runs.flatMap((run) => run.seconds.slice(-1)));
    return longest > 7200 ? ["hours", 3600] : longest > 120 ? ["minutes", 60] : ["seconds", 1];
  };
  const axisValues = (series) => series.x.map((step) => AXES[view.axis].of(data.runs[series.run], step));

  // The exponential moving average, without a bias towards 0 at the start.
  const smooth = (values, weight) => {
    let average = 0;
    return values.map((value, i) => {
      average = weight * average + (1 - weight) * value;
      return average / (1 - weight ** (i + 1));
    });
  };

  const linearTicks = (low, high) => {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };
  const logTicks = (low, high) => {
    const decades = Math.log10(high / low);
    if (decades < 0.5) return linearTicks(low, high);
    const factors = decades < 1.2 ? [1, 1.5, 2, 3, 5, 7] : decades < 3 ? [1, 2, 5] : [1];
    const every = Math.ceil(decades / 8);
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
      if (power % every === 0) ticks.push(...factors.map((factor) => +(factor * 10 ** power).toPrecision(3)));
    }
    return ticks.filter((tick) => tick >= low && tick <= high);
  };
  // The limits of the vertical axis: the values, and 6% beyond.
  const limits = (low, high, isLog) => {
    if (!isNumber(low)) return isLog ? [0.1, 1] : [0, 1];
    const [from, to] = isLog ? [Math.log(low), Math.log(high)] : [low, high];
    const isConstant = to - from <= 1e-6 * Math.abs(to); // up to rounding
    const margin = isConstant ? (isLog ? 0.1 : Math.abs(to) * 0.1 || 1) : 0.06 * (to - from);
    const both = [from - margin, to + margin];
    return isLog ? both.map(Math.exp) : both;
  };

  let isLinking = false; // one chart moves the cursors of the others

  class Chart {
    constructor(chart, place) {
      this.chart = chart;
      const every = chart.series.flatMap((one) => one.low || one.mean);
      this.canBeLog = every.every((value) => value > 0);
      this.isLog = chart.log && this.canBeLog;
      this.shown = chart.series.map(() => true);
      const names = chart.series.map((one) => one.label).join(", ");
      const label =
        `Chart: ${chart.title} in ${chart.y}. Lines: ${names}. Left and right move the cursor, plus and minus zoom, ` +
        "0 shows everything.";
      this.plotElement = make("div", { className: "plot", tabIndex: 0, role: "img", aria: { label } });
      this.status = make("p", { className: "axis-x", aria: { live: "polite" } });
      this.values = make("ul", { className: "values" });
      const numbers = make("details", {}, make("summary", {}, "Numbers"));
      numbers.addEventListener("toggle", () => numbers.children.length > 1 || numbers.append(...this.tables()));
      const head = make("div", { className: "chart-head" }, make("figcaption", {}, chart.title), this.makeButtons());
      place.append(make("figure", {}, head, this.plotElement, this.status, this.values, numbers));
      this.makeValues();
      this.plotElement.addEventListener("keydown", (event) => this.onKey(event));
      this.plotElement.addEventListener("dblclick", () => showRange(null));
    }

    makeButtons() {
      const labeled = (text, label, onclick) =>
        make("button", { type: "button", onclick, aria: { label: `${this.chart.title}: ${label}` } }, text);
      const buttons = [labeled("+", "zoom in", () => this.zoom(0.5)), labeled("−", "zoom out", () => this.zoom(2))];
      if (this.canBeLog) {
        const log = labeled("log", "logarithmic axis", () => {
          this.isLog = !this.isLog;
          log.setAttribute("aria-pressed", String(this.isLog));
          this.draw();
        });
        log.setAttribute("aria-pressed", String(this.isLog));
        buttons.push(log);
      }
      return make("div", { className: "controls" }, ...buttons);
    }

    makeValues() {
      this.outputs = this.chart.series.map((one, i) => {
        const swatch = make("span", { className: "swatch" });
        const value = make("span");
        const button = make("button", { type: "button", aria: { pressed: "true" } }, swatch, `${one.label} `, value);
        button.onclick = () => {
          this.shown[i] = !this.shown[i];
          button.setAttribute("aria-pressed", String(this.shown[i]));
          this.draw();
        };
        this.values.append(make("li", {}, button));
        return { swatch, value };
      });
    }

    tables() {
      return this.chart.series.map((one) => {
        const count = Math.min(one.x.length, 12);
        const rows = [...Array(count).keys()].map((i) => Math.round((i * (one.x.length - 1)) / Math.max(count - 1, 1)));
        const cells = (name, values, scope) => values.map((value) => make(name, scope ? { scope } : {}, value));
        const body = rows.map((i) => make("tr", {}, ...cells("td", [format(one.x[i]), format(one.mean[i])])));
        const head = make("tr", {}, ...cells("th", ["training step", this.chart.y], "col"));
        const caption = make("caption", {}, one.label);
        return make("table", {}, caption, make("thead", {}, head), make("tbody", {}, ...body));
      });
    }

    // One table [x, ...] of all series, with four columns for each: smoothed, lowest and highest value, mean.
    makeTable() {
      const { smoothing } = view;
      return uPlot.join(
        this.chart.series.map((one) => {
          const line = smoothing ? smooth(one.mean, smoothing) : one.mean;
          return [axisValues(one), line, one.low || one.mean, one.high || one.mean, one.mean];
        }),
      );
    }

    options() {
      const { chart } = this;
      const axis = { stroke: color("--text"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
      const values = (_, ticks) => ticks.map(short);
      const lines = chart.series.flatMap((one, i) => {
        const common = { show: this.shown[i], spanGaps: true, points: { show: false } };
        const bound = { ...common, stroke: "transparent", width: 0 };
        const points = { show: one.x.length < 40 && !view.smoothing, size: 5 };
        const raw = { ...common, show: this.shown[i] && view.smoothing > 0, stroke: `${seriesColor(i)}55`, width: 1 };
        return [{ ...common, stroke: seriesColor(i), width: 1.6, points }, bound, bound, raw];
      });
      const [min, max] = view.range || view.extent;
      return {
        width: Math.max(this.plotElement.clientWidth, 200),
        height: HEIGHT,
        legend: { show: false },
        cursor: { drag: { x: true, y: false, setScale: false } },
        scales: {
          x: { time: false, min, max, auto: false },
          y: { distr: this.isLog ? 3 : 1, range: (_, low, high) => limits(low, high, this.isLog) },
        },
        axes: [
          { ...axis, size: 30, values },
          {
            ...axis,
            size: 60,
            label: chart.y,
            labelSize: 18,
            labelFont: "12px system-ui, sans-serif",
            splits: (_, i, low, high) => (this.isLog ? logTicks : linearTicks)(low, high),
            filter: (_, ticks) => ticks,
            values,
          },
        ],
        series: [{}, ...lines],
        bands: chart.series.map((_, i) => ({ series: [4 * i + 3, 4 * i + 2], fill: `${seriesColor(i)}33`, show: this.shown[i] })),
        hooks: { setCursor: [() => this.onCursor()], setSelect: [(plot) => this.onSelect(plot)] },
      };
    }

    draw() {
      if (this.plot) this.plot.destroy();
      this.plot = null;
      this.table = this.makeTable();
      this.outputs.forEach(({ swatch }, i) => (swatch.style.background = seriesColor(i)));
      this.plot = new uPlot(this.options(), this.table, this.plotElement);
      this.showValues(null);
    }

    onSelect(plot) {
      const { left, width } = plot.select;
      if (width < 3) return;
      plot.setSelect({ left: 0, width: 0 }, false);
      showRange([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
    }

    onCursor() {
      if (!this.plot || isLinking) return;
      const { idx } = this.plot.cursor;
      this.showValues(idx);
      isLinking = true;
      for (const other of view.charts) if (other !== this && other.plot) other.follow(isNumber(idx) ? this.table[0][idx] : null);
      isLinking = false;
    }

    // Moves the cursor to a place of the horizontal axis that another chart shows.
    follow(x) {
      this.plot.setCursor({ left: x === null ? -10 : this.plot.valToPos(x, "x"), top: x === null ? -10 : 5 });
      this.showValues(x === null ? null : this.plot.cursor.idx);
    }

    showValues(at) {
      this.chart.series.forEach((one, i) => {
        const [line, low, high, mean] = [1, 2, 3, 4].map((j) => (isNumber(at) ? this.table[4 * i + j][at] : null));
        const bounds = one.low && isNumber(low) ? ` (${format(low)} to ${format(high)})` : "";
        const smoothed = view.smoothing && isNumber(line) ? `, smoothed ${format(line)}` : "";
        this.outputs[i].value.textContent = isNumber(at) ? `${format(mean)}${bounds}${smoothed}` : "";
      });
      const title = AXES[view.axis].title();
      this.status.textContent = isNumber(at) ? `${title}: ${format(this.table[0][at])}` : title;
    }

    moveCursor(change) {
      const x = this.table[0];
      const { min, max } = this.plot.scales.x;
      const last = x.length - 1;
      const start = this.plot.cursor.idx ?? (change > 0 ? -1 : last + 1);
      const first = x.findIndex((value) => value >= min);
      const end = last - [...x].reverse().findIndex((value) => value <= max);
      const index = Math.min(Math.max(start + change, first), end);
      this.plot.setCursor({ left: this.plot.valToPos(x[index], "x"), top: 5 });
    }

    zoom(factor) {
      const { min, max } = this.plot.scales.x;
      const { idx } = this.plot.cursor;
      const center = isNumber(idx) ? this.table[0][idx] : (min + max) / 2;
      const half = ((max - min) / 2) * factor;
      showRange([Math.max(center - half, view.extent[0]), Math.min(center + half, view.extent[1])]);
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
        0: () => showRange(null),
      };
      if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      actions[event.key]();
    }
  }

  // All charts show the same part of the horizontal axis. null: everything.
  const showRange = (range) => {
    if (range && !(range[1] > range[0])) return;
    view.range = range;
    const [min, max] = range || view.extent;
    for (const chart of view.charts) chart.plot.setScale("x", { min, max });
  };
  const drawAll = () => {
    const x = data.charts.flatMap((chart) => chart.series.flatMap(axisValues));
    const [low, high] = x.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
    view.extent = [low, high > low ? high : low + 1];
    view.charts.forEach((chart) => chart.draw());
  };

  // ---- Numbers of the curves as files

  const quote = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? ""); // no formulas
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = () => {
    const rows = [["run", "quantity", "step", "examples", "seconds", "mean", "lowest", "highest"]];
    for (const one of data.charts.flatMap((chart) => chart.series)) {
      const run = data.runs[one.run];
      one.x.forEach((step, i) => {
        const time = AXES.time.can(run) ? +seconds(run, step).toPrecision(6) : null;
        const examples = run.batch ? step * run.batch : null;
        const bounds = [one.low, one.high].map((values) => (values || one.mean)[i]);
        rows.push([run.name, one.name, step, examples, time, one.mean[i], ...bounds]);
      });
    }
    return rows.map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n";
  };
  const download = (end, kind, text) => {
    const name = data.runs.map((run) => run.name).join("_").replace(/[^\w.-]+/g, "_").slice(0, 80);
    const href = URL.createObjectURL(new Blob([text], { type: kind }));
    make("a", { href, download: `${name}_curves.${end}` }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10_000);
  };

  const addCurves = (section, curves) => {
    data = curves;
    const { lines, points } = data;
    const means = `They are shown as ${points} means, with a band from the lowest to the highest value of each interval.`;
    section.append(make("p", {}, `${format(lines)} lines of the log. ${lines > points ? means : ""}`));
    const axis = make("select", { onchange: () => ((view.axis = axis.value), (view.range = null), drawAll()) });
    for (const [name, { can }] of Object.entries(AXES)) {
      axis.append(make("option", { value: name, disabled: !data.runs.every(can) }, name));
    }
    const output = make("output", {}, "0");
    const smoothing = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0 });
    smoothing.addEventListener("input", () => {
      output.textContent = smoothing.value;
      view.smoothing = Number(smoothing.value);
      view.charts.forEach((chart) => chart.draw());
    });
    const controls = [
      make("label", {}, "Axis ", axis),
      make("label", {}, "Smoothing ", smoothing, " ", output),
      button("Show everything", () => showRange(null)),
      button("Download CSV", () => download("csv", "text/csv", csv())),
      button("Download JSON", () => download("json", "application/json", JSON.stringify(data))),
    ];
    const place = make("div", { className: "charts" });
    section.append(make("div", { className: "controls curve-controls" }, ...controls), place);
    view.charts = data.charts.map((chart) => new Chart(chart, place));
    drawAll();
  };

  // ---- Tables and pictures

  const addTable = (section, { caption, header, rows, kind, ...ranked }) => {
    const head = header.map((text) => make("th", { scope: "col" }, String(text)));
    const cells = rows.map((row) =>
      row.map((text, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, String(text))),
    );
    let title = caption;
    if (kind === "numbers" && rows.length > 1) {
      const isEqual = (i) => i && !ranked.better[i] && rows.every((row) => row[i] === rows[0][i]);
      const equal = header.map((_, i) => i).filter(isEqual);
      const hidden = [...equal, header.indexOf("samples")].filter((i) => i > 0); // file names repeat other columns
      if (equal.length) title += `. In all rows: ${equal.map((i) => `${header[i]} ${rows[0][i]}`).join(", ")}`;
      title += ". A bar is a value with its error; the shaded part is the error of the best value of the same protocol";
      markBest(cells, ranked);
      for (const row of [head, ...cells]) hidden.forEach((i) => (row[i].hidden = true));
    }
    const [first, ...others] = [head, ...cells].map((row) => make("tr", {}, ...row));
    const content = [make("thead", {}, first), make("tbody", {}, ...others)];
    const place = make("div", { className: "scroll", tabIndex: 0, aria: { label: caption } });
    place.setAttribute("role", "region");
    place.append(make("table", { className: kind, aria: { label: caption } }, ...content));
    section.append(make("p", { className: "caption" }, `${title}.`), place);
  };

  // Marks the best values of measurements with the same protocol, and draws each error beside the error of the best value.
  const markBest = (cells, { numbers, better, protocols }) => {
    better.forEach((direction, column) => {
      const score = { lower: (value) => value, higher: (value) => -value, "closer to 0": Math.abs }[direction];
      if (!score) return;
      for (const protocol of new Set(protocols)) {
        const group = numbers
          .map((row, i) => ({ i, value: row[column][0], error: row[column][1] || 0 }))
          .filter(({ i, value }) => protocols[i] === protocol && isNumber(value));
        if (group.length < 2) continue;
        const best = group.reduce((one, other) => (score(other.value) < score(one.value) ? other : one));
        const low = Math.min(...group.map(({ value, error }) => value - error));
        const width = Math.max(...group.map(({ value, error }) => value + error)) - low || 1;
        const place = (value) => `${(100 * (value - low)) / width}%`;
        for (const { i, value, error } of group) {
          const overlaps = Math.abs(value - best.value) <= error + best.error;
          const mark = value === best.value ? "best" : overlaps ? "errors overlap" : "";
          const bar = make("span", { className: "interval" }, make("i"));
          const ends = { low: value - error, high: value + error, "best-low": best.value - best.error, "best-high": best.value + best.error };
          for (const [name, end] of Object.entries(ends)) bar.style.setProperty(`--${name}`, place(end));
          cells[i][column].append(make("span", { className: "mark" }, mark), bar);
        }
      }
    });
  };

  // Describes folder/file.png as this program names it; otherwise the file's name.
  const CONTENTS = {
    trajectories: "Samples being denoised",
    edits: "Edits",
    memorization: "Samples beside the nearest training examples",
    histograms: "Histograms of samples and data",
    spectrum: "Power spectra of samples and data",
    autocorrelation: "Autocorrelations of samples and data",
    likelihood_terms: "Terms of the likelihood bound",
    rate_distortion: "Rate and distortion",
    calibration: "Calibration",
    train_step: "Samples during training",
    step: "Samples",
  };
  const describe = (name) => {
    const [, folder, file] = /^(.*)\/(.*)\.png$/.exec(name) || [null, "", name];
    const kind = Object.keys(CONTENTS).find((start) => start === folder || file.startsWith(start));
    const drawn = /step(\d+)_(ema|raw)_([a-z_+]*[a-z+])(\d*)(.*?)_seed(\d+)_n(\d+)(_x_0)?/.exec(file);
    const during = /^train_step(\d+)$/.exec(file);
    if (!kind) return file || name;
    if (during) return `${CONTENTS[kind]}, after ${format(Number(during[1]))} steps`;
    if (!drawn) return CONTENTS[kind];
    const [, step, weights, sampler, steps, options, seed, count, x0] = drawn;
    const how = [
      `${weights.replace("ema", "EMA")} weights of step ${format(Number(step))}`,
      steps ? `${sampler} with ${format(Number(steps))} steps` : sampler,
      ...options.split("_").filter(Boolean),
      `seed ${seed}`,
      `${format(Number(count))} drawn`,
    ];
    return `${CONTENTS[kind]}${x0 ? ", x_0 as the network predicts it" : ""}: ${how.join(", ")}`;
  };

  const makeFigure = ({ src, width, height, caption }, shown = describe(caption)) =>
    make("figure", { title: caption }, make("img", { src, width, height, alt: shown }), make("figcaption", {}, shown));

  const addFrames = (section, { names, captions, images: sources, start: first }) => {
    const drawn = sources[first].map((picture, i) => makeFigure(picture, names[i]));
    const images = drawn.map((figure) => figure.querySelector("img"));
    const caption = make("p", { className: "frame-caption", id: `${section.id}-caption`, aria: { live: "polite" } }, captions[first]);
    const place = make("div", { className: "frames" }, make("div", { className: "pictures" }, ...drawn), caption);
    section.append(place);
    const count = captions.length;
    if (count < 2) return;
    const slider = make("input", { type: "range", min: 0, max: count - 1, step: 1, aria: { labelledby: caption.id } });
    const play = button("Play", () => (timer ? stop() : start()));
    play.setAttribute("aria-pressed", "false");
    const move = (change) => show(Number(slider.value) + change);
    const controls = [button("Previous", () => move(-1)), slider, button("Next", () => move(1)), play];
    let timer = null;
    const show = (index) => {
      const wrapped = (index + count) % count;
      slider.value = wrapped;
      slider.setAttribute("aria-valuetext", captions[wrapped]);
      caption.textContent = `${captions[wrapped]} (${wrapped + 1} of ${count})`;
      images.forEach((image, i) => {
        const { src, width, height } = sources[wrapped][i];
        Object.assign(image, { src, width, height, alt: `${names[i]}, ${captions[wrapped]}` });
      });
    };
    const start = () => {
      play.textContent = "Stop";
      play.setAttribute("aria-pressed", "true");
      caption.setAttribute("aria-live", "off");
      timer = setInterval(() => move(1), 600);
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
      play.setAttribute("aria-pressed", "false");
      caption.setAttribute("aria-live", "polite");
    };
    slider.addEventListener("input", () => show(Number(slider.value)));
    place.append(make("div", { className: "controls" }, ...controls));
    show(first);
  };

  const makeTerms = (terms) => make("dl", {}, ...terms.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));

  const addCard = (section, { result, facts, picture }) => {
    const parts = [make("p", { className: "verdict" }, result.verdict)];
    if (result.value) {
      const value = [make("strong", {}, result.value), make("span", {}, result.name)];
      parts.unshift(make("p", { className: "result" }, ...value));
      parts.push(make("p", { className: "source" }, result.source + (result.others ? ` Also: ${result.others}.` : "")));
    }
    const shown = picture ? makeFigure(picture) : make("p", {}, "There are no samples.");
    const answer = make("div", { className: "answer" }, ...parts);
    section.append(make("div", { className: "card" }, answer, makeTerms(Object.entries(facts)), shown));
  };

  const asTime = (time) => `${new Date(1000 * time).toISOString().slice(0, 19).replace("T", " ")} UTC`;
  const asDuration = (time) => {
    const [hours, minutes] = [Math.floor(time / 3600), Math.floor(time / 60) % 60].map((part) => String(part).padStart(2, "0"));
    return `${hours}:${minutes}:${String(Math.round(time) % 60).padStart(2, "0")}`;
  };

  const addLaunches = (section, { launches, unused }) => {
    const rows = launches.map(({ start, end, first_step, last_step, stopped_by = "" }, i) => {
      const again = i + 1 < launches.length ? Math.max(last_step - launches[i + 1].first_step, 0) : 0;
      return [asTime(start), asDuration(end - start), ...[first_step, last_step, again].map(format), stopped_by];
    });
    const header = ["start", "duration", "from step", "to step", "steps done again later", "stopped by"];
    addTable(section, { caption: "A row for each launch", header, rows, kind: "times" });
    const text = `Damaged or unfinished checkpoints, which are not used: ${unused.join(", ")}.`;
    if (unused.length) section.append(make("p", {}, text));
  };

  const asText = (value) => {
    if (Array.isArray(value)) return value.map(asText).join(", ");
    if (value === null || typeof value !== "object") return String(value);
    return Object.entries(value).map(([name, each]) => `${name} ${asText(each)}`).join(", ");
  };
  const addEnvironment = (section, known) =>
    section.append(makeTerms(Object.entries(known).map(([name, value]) => [name.replaceAll("_", " "), asText(value)])));

  // ---- The page

  const makeNotes = (notes) => make("ul", { className: "notes" }, ...notes.map((note) => make("li", {}, note)));
  const ADD = {
    card: addCard,
    code: (section, text) => section.append(make("pre", { tabIndex: 0, aria: { label: "Command" } }, text)),
    curves: addCurves,
    details: (section, [title, blocks]) => {
      const details = make("details", {}, make("summary", {}, title));
      section.append(details);
      addBlocks(details, blocks);
    },
    environment: addEnvironment,
    frames: addFrames,
    gallery: (section, pictures) =>
      section.append(make("div", { className: "gallery" }, ...pictures.map((picture) => makeFigure(picture)))),
    launches: addLaunches,
    notes: (section, notes) => section.append(makeNotes(notes)),
    table: addTable,
    terms: (section, terms) => section.append(makeTerms(terms)),
    text: (section, text) => section.append(make("p", {}, text)),
  };
  const addBlocks = (section, blocks) =>
    blocks.forEach((block) => Object.entries(block).forEach(([kind, values]) => ADD[kind](section, values)));

  const report = JSON.parse(document.querySelector("#report").textContent);
  const main = document.querySelector("main");
  const links = report.sections.map(({ id, title }) => make("li", {}, make("a", { href: `#${id}` }, title)));
  main.before(make("nav", { aria: { label: "Sections" } }, make("ul", {}, ...links)));
  if (report.notes.length) main.append(makeNotes(report.notes));
  for (const { id, title, blocks } of report.sections) {
    const heading = make("h2", { id: `${id}-title` }, title); // makes the section a named region
    const section = make("section", { id, aria: { labelledby: heading.id } }, heading);
    main.append(section);
    try {
      addBlocks(section, blocks);
    } catch (error) {
      section.append(makeNotes([`This section is not complete, because a file holds invalid values (${error.message}).`]));
    }
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();

  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    view.charts.forEach((chart) => chart.draw());
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.charts.forEach((chart) => chart.draw()));
})();
