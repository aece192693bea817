"use strict";
(function () {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", function () {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const data = document.getElementById("curve-data");
  if (!data) return;
  const curve = JSON.parse(data.textContent);
  const slider = document.getElementById("threshold");
  const dot = document.querySelector("#curve .dot");
  const points = document.querySelector("#curve .line").points;
  const number = new Intl.NumberFormat("en");
  function show() {
    const i = Number(slider.value), kept = curve.kept[i];
    document.getElementById("at").textContent = curve.threshold[i].toFixed(4);
    document.getElementById("stay").textContent = number.format(kept);
    document.getElementById("go").textContent = number.format(curve.rows - kept);
    document.getElementById("share").textContent = (100 * kept / curve.rows).toFixed(1) + " %";
    slider.setAttribute("aria-valuetext", curve.threshold[i] + ": " + number.format(kept) + " rows stay");
    dot.setAttribute("cx", points.getItem(i).x);
    dot.setAttribute("cy", points.getItem(i).y);
  }
  slider.disabled = false;
  slider.addEventListener("input", show);
  show();
})();
