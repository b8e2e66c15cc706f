"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const places = [...document.querySelectorAll(".chart")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isTouched = matchMedia("(pointer: coarse)").matches;
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const merged = (a, b) => {
    const result = { ...a };
    for (const key of Object.keys(b || {})) {
      const both = [result[key], b[key]].every((each) => each && typeof each === "object" && !Array.isArray(each));
      result[key] = both ? merged(result[key], b[key]) : b[key];
    }
    return result;
  };

  const coloured = (trace) => {
    const slot = trace.meta.slot;
    const color = slot < 0 ? style("--ink") : style(`--series-${slot % 8}`);
    return merged(trace, { line: { color }, marker: { color, line: { color } } });
  };

  const layout = (chart) => {
    const ink = style("--ink"), line = style("--line");
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: isTouched };
    const common = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12, family: "inherit" },
      margin: { l: 12, r: 12, t: 8, b: 12 }, autosize: true, hovermode: "x unified", dragmode: isTouched ? false : "zoom",
      hoverlabel: { bgcolor: style("--panel"), bordercolor: line, font: { color: ink } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      xaxis: { ...axis, title: { text: "step", standoff: 4 }, rangemode: "tozero" },
      yaxis: { ...axis, nticks: 6, hoverformat: ".5g" },
    };
    const own = { ...chart.layout, shapes: (chart.layout.shapes || []).map((each) => merged(each, { line: { color: style("--quiet") } })) };
    return merged(common, own);
  };

  const draw = () => places.forEach((place, i) => {
    const config = { responsive: true, displayModeBar: false, plotlyServerURL: "" }; // its bar would lie over legends
    Plotly.react(place, charts[i].traces.map(coloured), layout(charts[i]), config);
  });
  draw();
  dark.addEventListener("change", draw);

  const live = document.querySelector("meta[name=ochat-reload-s]");
  if (!live) return;
  const follow = document.getElementById("follow");
  const opened = () => [...document.querySelectorAll("details")].map((each) => [each.id, each.open]);
  const keep = (state) => { try { sessionStorage.setItem("ochat", JSON.stringify(state)); } catch { /* a page without storage starts at its top */ } };
  const kept = () => { try { return JSON.parse(sessionStorage.getItem("ochat")); } catch { return null; } };
  const before = kept();
  if (before) {
    history.scrollRestoration = "manual";
    follow.checked = before.follow;
    for (const [id, isOpen] of before.opened) { const each = document.getElementById(id); if (each) each.open = isOpen; }
    scrollTo(0, before.y);
  }
  follow.addEventListener("change", () => keep({ y: scrollY, follow: follow.checked, opened: opened() }));
  setInterval(() => {
    if (!follow.checked || document.hidden) return;
    keep({ y: scrollY, follow: true, opened: opened() });
    location.reload();
  }, 1000 * Number(live.content));
})();
