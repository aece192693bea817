"use strict";
(function () {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", function () {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const data = document.getElementById("cuts-data");
  if (!data) return;
  const page = JSON.parse(data.textContent);
  document.getElementById("drag").hidden = false;
  const number = new Intl.NumberFormat("en");
  const said = function (text) { return "'" + text.replaceAll("'", "'\"'\"'") + "'"; };

  page.controls.forEach(function (cut) {
    const figure = document.getElementById(cut.id);
    const charts = Array.from(document.querySelectorAll('svg[data-control="' + cut.id + '"]'));
    const first = { low: cut.low, high: cut.high };
    const ends = ["low", "high"].filter(function (end) { return cut[end] !== null; });
    const part = function (name) { return figure.querySelector('[data-part="' + name + '"]'); };

    function step() {
      const places = ["high", "low"].filter(function (end) { return cut[end] !== null; });
      return cut.head + places.map(function (end) { return cut.names[cut[end]]; }).join(", ") + cut.tail;
    }
    function stay() {
      if (!cut.from_top) return cut.kept[cut.high];
      return cut.kept[cut.low] - (cut.high === null ? 0 : cut.kept[cut.high]);
    }
    function draw(svg) {
      const d = svg.dataset, left = Number(d.start), right = Number(d.end), low = Number(d.low), high = Number(d.high);
      const place = function (value) {
        return left + (right - left) * Math.min(1, Math.max(0, high > low ? (value - low) / (high - low) : 0.5));
      };
      const from = cut.low === null ? left : place(cut.values[cut.low]);
      const to = cut.high === null ? right : place(cut.values[cut.high]);
      const stays = svg.querySelector(".stay");
      stays.setAttribute("x", from);
      stays.setAttribute("width", Math.max(1.5, to - from));
      svg.querySelectorAll(".grip").forEach(function (grip) {
        grip.setAttribute("transform", "translate(" + (grip.dataset.end === "low" ? from : to) + ")");
      });
      const dot = svg.querySelector(".dot");
      if (dot) {
        const point = svg.querySelector(".line").points.getItem(cut[ends[0]]);
        dot.setAttribute("cx", point.x);
        dot.setAttribute("cy", point.y);
      }
    }
    function show() {
      const kept = stay(), moved = ends.some(function (end) { return cut[end] !== first[end]; });
      part("stay").textContent = number.format(kept);
      part("share").textContent = (100 * kept / Math.max(1, cut.rows)).toFixed(1) + "\u00a0%";
      part("go").textContent = number.format(cut.rows - kept);
      part("step").textContent = step();
      part("again").hidden = part("reset").hidden = !moved;
      const words = page.select.concat(cut.before.concat([step()], cut.after).map(function (text) { return "--step " + said(text); }));
      part("again").textContent = words.join(" ");
      ends.forEach(function (end) {
        const slider = part(end);
        slider.value = cut[end];
        slider.setAttribute("aria-valuetext", cut.names[cut[end]] + ": " + number.format(kept) + " rows stay");
      });
      charts.forEach(draw);
    }
    function move(end, place) {
      const least = end === "high" && cut.low !== null ? cut.low + 1 : 0;
      const most = end === "low" && cut.high !== null ? cut.high - 1 : cut.values.length - 1;
      cut[end] = Math.min(most, Math.max(least, place));
      show();
    }
    function nearest(value) {
      let best = 0;
      cut.values.forEach(function (v, i) { if (Math.abs(v - value) < Math.abs(cut.values[best] - value)) best = i; });
      return best;
    }
    ends.forEach(function (end) {
      const slider = part(end);
      slider.disabled = false;
      slider.addEventListener("input", function () { move(end, Number(slider.value)); });
    });
    part("reset").addEventListener("click", function () {
      ends.forEach(function (end) { cut[end] = first[end]; });
      show();
      part(ends[0]).focus();
    });
    charts.forEach(function (svg) {
      let held = null;
      const value = function (event) {
        const d = svg.dataset, at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
        return Number(d.low) + (Number(d.high) - Number(d.low)) * (at - Number(d.start)) / (Number(d.end) - Number(d.start));
      };
      svg.addEventListener("pointerdown", function (event) {
        const at = value(event);
        held = ends.reduce(function (a, b) {
          return Math.abs(cut.values[cut[b]] - at) < Math.abs(cut.values[cut[a]] - at) ? b : a;
        });
        svg.setPointerCapture(event.pointerId);
        move(held, nearest(at));
      });
      svg.addEventListener("pointermove", function (event) { if (held) move(held, nearest(value(event))); });
      ["pointerup", "pointercancel"].forEach(function (name) { svg.addEventListener(name, function () { held = null; }); });
    });
    show();
  });
})();
