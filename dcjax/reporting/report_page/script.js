"use strict";
// A list of things to read one at a time: with a pointer, or with the arrow keys where it has the focus.
function readable(element, count, show) {
  let at = count - 1;
  const go = to => { at = Math.max(0, Math.min(count - 1, to)); show(at); };
  element.addEventListener("keydown", event => {
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: count - 1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(to);
  });
  return go;
}

for (const figure of document.querySelectorAll("figure")) {
  const points = JSON.parse(figure.dataset.points), picture = figure.querySelector(".picture");
  const go = readable(figure, points.length, at => {
    figure.querySelector("i").style.left = `${100 * points[at][0]}%`;
    figure.querySelector("output").textContent = points[at][1];
  });
  const point = event => {
    const box = picture.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    const distances = points.map(point => Math.abs(point[0] - x));
    go(distances.indexOf(Math.min(...distances)));
  };
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  go(points.length - 1);
}

for (const response of document.querySelectorAll(".response[tabindex]")) {
  const tokens = [...response.querySelectorAll(".token")], output = response.nextElementSibling;
  const go = readable(response, tokens.length, at => {
    tokens.forEach((token, number) => token.classList.toggle("chosen", number === at));
    output.textContent = `${JSON.stringify(tokens[at].textContent)}: ${tokens[at].dataset.told}`;
  });
  const point = event => {
    const at = tokens.indexOf(event.target);
    if (at >= 0) go(at);
  };
  response.addEventListener("pointerover", point);
  response.addEventListener("pointerdown", point);
}
