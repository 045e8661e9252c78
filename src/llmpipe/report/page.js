// The numbers under the pointer. A chart says the ends of its axes and the size of its field; its curves are their paths.
for (const chart of document.querySelectorAll("svg[data-axes]")) {
  const { x, y, width, height, left } = JSON.parse(chart.dataset.axes);
  const curves = [...chart.querySelectorAll(".curve:not(.median)")].map((path) => ({
    color: [...path.classList].find((name) => /^c[0-9]$/.test(name)),
    points: path.getAttribute("d").slice(1).split(/[ML]/).map((point) => point.split(" ").map(Number)),
  }));
  const hair = chart.querySelector(".hair");
  const readout = chart.querySelector(".readout");

  const value = (axis, share) =>
    axis.log ? axis.low * (axis.high / axis.low) ** share : axis.low + (axis.high - axis.low) * share;
  const short = (number) => Number(number.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });

  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width - left;
    const nearest = curves.map(({ color, points }) => ({
      color,
      point: points.reduce((best, point) => (Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best)),
    }));
    const [place] = nearest[0].point;
    hair.setAttribute("d", `M${place} 0V${height}`);
    readout.replaceChildren(`${chart.dataset.x} ${Math.round(value(x, place / width)).toLocaleString("en")}: `);
    for (const { color, point } of nearest) {
      const number = document.createElementNS("http://www.w3.org/2000/svg", "tspan");
      number.setAttribute("class", color);
      number.textContent = ` ${short(value(y, 1 - point[1] / height))}`;
      readout.append(number);
    }
  });
  chart.addEventListener("pointerleave", () => {
    hair.removeAttribute("d");
    readout.replaceChildren();
  });
}
