"use strict";

function drawCharts() {
  for (const place of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(place.nextElementSibling.textContent);
    vegaEmbed(place, spec, {ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: {disableDefaultStyle: true}});
  }
}

function showMarked() {
  for (const marked of document.querySelectorAll(".contexts:not(.wraps) .marked")) {
    const line = marked.parentElement;
    line.scrollLeft += marked.getBoundingClientRect().left - line.getBoundingClientRect().left - line.clientWidth * 0.6;
  }
}

showMarked();
if (window.vegaEmbed) drawCharts();
