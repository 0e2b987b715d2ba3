(() => {
  "use strict";
  const { charts, strips } = JSON.parse(document.getElementById("data").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const HEIGHT = 230;
  const made = new Map();

  const number = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4));
  };

  // What the cursor's table shows without a cursor: the last value of each line.
  const last = (values) => {
    for (let i = values.length - 1; i >= 0; i--) if (values[i] != null) return values[i];
    return null;
  };

  function draw(place) {
    const chart = charts[place.dataset.chart];
    const old = made.get(place);
    if (old) old.destroy();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const lines = chart.series.map((line) => ({
      label: line.label,
      stroke: colour(`--c${line.colour % 8}`),
      width: 2,
      dash: line.dashed ? [6, 5] : undefined,
      spanGaps: true,
      points: { show: line.points && !line.dashed, size: 5, fill: colour(`--c${line.colour % 8}`) },
      value: (u, value, series, i) => number(i == null ? last(u.data[series]) : value),
    }));
    const plot = new uPlot({
      width: Math.max(place.clientWidth, 200),
      height: HEIGHT,
      cursor: { sync: { key: "epochs" }, drag: { x: true, y: false } },
      scales: {
        x: { time: false },
        y: { range: (u, low, high) => (low == null ? [0, 1] : low === high ? [Math.min(low, 0), low > 0 ? 1.2 * low : 1] : uPlot.rangeNum(low, high, 0.1, true)) },
      },
      legend: { live: true },
      series: [{ label: "epoch", value: (u, value) => (value == null ? "last" : String(value)) }, ...lines],
      axes: [
        { ...axis, size: 32, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 2000, 5000], values: (u, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? String(tick) : "")) },
        { ...axis, size: 62, values: (u, ticks) => ticks.map(number) },
      ],
    }, chart.data, place);
    made.set(place, plot);
  }

  const places = [...document.querySelectorAll(".plot")];
  places.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places.forEach(draw));
  const observer = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const plot = made.get(entry.target);
      const width = Math.floor(entry.contentRect.width);
      if (plot && width > 0 && width !== plot.width) plot.setSize({ width, height: HEIGHT });
    }
  });
  places.forEach((place) => observer.observe(place));

  document.querySelectorAll(".strip").forEach((element) => {
    const strip = strips[element.dataset.strip];
    const slider = element.querySelector("input");
    const told = element.querySelector("output");
    const button = element.querySelector("button");
    let timer = null;
    const show = () => {
      const at = Number(slider.value);
      const epoch = strip.epochs[at];
      element.querySelectorAll("img.now").forEach((image) => { image.src = strip.images[at][image.dataset.picture]; });
      element.querySelectorAll(".when").forEach((label) => { label.textContent = `epoch ${epoch}`; });
      told.textContent = epoch === 0 ? "before training" : `after epoch ${epoch}`;
    };
    const stop = () => { clearInterval(timer); timer = null; button.innerHTML = "&#9654;"; };
    slider.addEventListener("input", () => { stop(); show(); });
    button.addEventListener("click", () => {
      if (timer) { stop(); return; }
      slider.value = 0;
      show();
      button.innerHTML = "&#10073;&#10073;";
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        show();
        if (slider.value === slider.max) stop();
      }, 700);
    });
    if (strip.epochs.length < 2) button.disabled = true;
    show();
  });
  document.documentElement.dataset.ready = "true";
})();
