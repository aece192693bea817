"use strict";
const labels = new Map();
const label = document.getElementById("label");
for (const box of document.querySelectorAll(".mark"))
  box.addEventListener("change", () => {
    for (const other of document.querySelectorAll(".mark"))
      if (other.dataset.key === box.dataset.key) other.checked = box.checked;
    if (box.checked) labels.set(box.dataset.key, label.value.trim() || "yes");
    else labels.delete(box.dataset.key);
    document.getElementById("marked").textContent = `${labels.size} marked`;
  });
document.getElementById("download").addEventListener("click", () => {
  const lines = [...labels].map(([key, name]) => `${key}\t${name}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "text/tab-separated-values" }));
  link.download = "marked.tsv";
  link.click();
  URL.revokeObjectURL(link.href);
});
