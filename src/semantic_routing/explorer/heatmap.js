// Cells of the heat map: a click chooses one, a drag along a row moves what the row reads.
let held = null;
const cellAt = (x, y) => {
  const found = document.elementFromPoint(x, y);
  return found && element.contains(found) ? found.closest("td[data-layer]") : null;
};
const place = (cell) => ({ row: cell.dataset.row, layer: cell.dataset.layer });
element.addEventListener("pointerdown", (event) => {
  const cell = event.target.closest("td[data-layer]");
  if (cell && event.button === 0) held = { ...place(cell), moved: false };
});
window.addEventListener("pointermove", (event) => {
  if (!held) return;
  const cell = cellAt(event.clientX, event.clientY);
  if (!cell || cell.dataset.row !== held.row || cell.dataset.layer === held.layer) return;
  held = { ...place(cell), moved: true };
  trigger("input", place(cell));
});
window.addEventListener("pointerup", () => {
  if (!held) return;
  const { row, layer, moved } = held;
  held = null;
  trigger(moved ? "release" : "click", { row, layer });
});
window.addEventListener("pointercancel", () => { held = null; });
