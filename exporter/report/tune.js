// A spot that is hovered or focused is told below its plot and marked in the table; arrow keys go from spot to spot.
for (const figure of document.querySelectorAll("figure")) {
  const spots = [...figure.querySelectorAll(".spot")], said = figure.querySelector("output");
  const show = (spot) => {
    said.textContent = spot.getAttribute("aria-label");
    for (const row of document.querySelectorAll("tr.told")) row.classList.remove("told");
    document.getElementById(`c${spot.dataset.place}`)?.classList.add("told");
  };
  spots.forEach((spot, i) => {
    spot.addEventListener("mouseenter", () => show(spot));
    spot.addEventListener("focus", () => show(spot));
    spot.addEventListener("keydown", (event) => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      spots[(i + step + spots.length) % spots.length].focus();
    });
  });
}
