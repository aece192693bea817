"use strict";
(function () {
  const boxes = Array.from(document.querySelectorAll("input.mark"));
  if (!boxes.length) return;
  const labels = new Map(), label = document.getElementById("label");
  boxes.forEach(function (box) {
    box.hidden = false;
    box.addEventListener("change", function () {
      boxes.forEach(function (other) { if (other.dataset.key === box.dataset.key) other.checked = box.checked; });
      if (box.checked) labels.set(box.dataset.key, label.value.trim() || "yes");
      else labels.delete(box.dataset.key);
      document.getElementById("marked").textContent = labels.size + " marked";
    });
  });
  document.getElementById("marks").hidden = false;
  document.getElementById("download").addEventListener("click", function () {
    const lines = Array.from(labels, function (pair) { return pair[0] + "\t" + pair[1] + "\n"; });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "text/tab-separated-values" }));
    link.download = "marked.tsv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
