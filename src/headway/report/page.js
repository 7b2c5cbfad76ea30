// Zoom for the timelines. Every one of them shows the same part of the same axis, from `from` for 1/`zoom` of it.
"use strict";
for (const box of document.querySelectorAll(".timelines")) {
  const pictures = [...box.querySelectorAll("svg[data-seconds]")].map((svg) => ({
    svg,
    left: +svg.dataset.left,
    right: +svg.dataset.right,
    spans: svg.querySelector(".spans"),
    labels: [...svg.querySelectorAll(".spans text")],
    ticks: [...svg.querySelectorAll(".tick text")].map((text) => ({ text, x: +text.getAttribute("x"), first: text.textContent })),
    seconds: +svg.dataset.seconds,
  }));
  if (!pictures.length) continue;
  let zoom = 1, from = 0; // `from`: share of the axis that lies left of the picture

  const seconds = (value) => {
    if (Math.abs(value) < 1e-12) return "0 s";
    for (const [unit, size] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]])
      if (Math.abs(value) >= size) return Number((value / size).toPrecision(Math.min(8, 3 + Math.round(Math.log10(zoom))))) + " " + unit;
    return Number((value / 1e-9).toPrecision(3)) + " ns";
  };

  const show = () => {
    zoom = Math.min(400, Math.max(1, zoom));
    from = Math.min(1 - 1 / zoom, Math.max(0, from));
    box.classList.toggle("zoomed", zoom > 1);
    for (const p of pictures) {
      const width = p.right - p.left;
      if (p.spans) p.spans.setAttribute("transform", `translate(${p.left - zoom * (p.left + from * width)} 0) scale(${zoom} 1)`);
      for (const label of p.labels) {
        const x = +label.getAttribute("x");
        label.setAttribute("transform", `translate(${x} 0) scale(${1 / zoom} 1) translate(${-x} 0)`);
      }
      for (const t of p.ticks)
        t.text.textContent = zoom === 1 ? t.first : seconds((from + (t.x - p.left) / width / zoom) * p.seconds);
    }
    state.textContent = zoom === 1 ? "" : `${zoom < 10 ? zoom.toFixed(1) : Math.round(zoom)} ×`;
  };

  const around = (share, factor) => {
    const at = from + share / zoom;
    zoom = Math.min(400, Math.max(1, zoom * factor));
    from = at - share / zoom;
    show();
  };

  const bar = document.createElement("div");
  bar.className = "zoom";
  const button = (text, label, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-label", label);
    made.addEventListener("click", action);
    bar.append(made);
  };
  button("+", "Zoom in", () => around(0.5, 1.6));
  button("−", "Zoom out", () => around(0.5, 1 / 1.6));
  button("←", "Earlier", () => { from -= 0.3 / zoom; show(); });
  button("→", "Later", () => { from += 0.3 / zoom; show(); });
  button("Whole step", "Show the whole step", () => { zoom = 1; show(); });
  const state = document.createElement("output");
  bar.append(state);
  box.prepend(bar);

  for (const p of pictures) {
    const share = (event) => {
      const frame = p.svg.getBoundingClientRect();
      const x = ((event.clientX - frame.left) / frame.width) * p.svg.viewBox.baseVal.width;
      return (x - p.left) / (p.right - p.left);
    };
    p.svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // a plain wheel scrolls the page
      event.preventDefault();
      around(Math.min(1, Math.max(0, share(event))), Math.exp(-event.deltaY / 240));
    }, { passive: false });
    let held = null;
    p.svg.addEventListener("pointerdown", (event) => {
      if (zoom > 1) { held = { at: share(event), from }; p.svg.setPointerCapture(event.pointerId); }
    });
    p.svg.addEventListener("pointermove", (event) => {
      if (held) { from = held.from - (share(event) - held.at) / zoom; show(); }
    });
    for (const end of ["pointerup", "pointercancel"]) p.svg.addEventListener(end, () => { held = null; });
    p.svg.addEventListener("dblclick", (event) => around(share(event), 2));
  }
}
