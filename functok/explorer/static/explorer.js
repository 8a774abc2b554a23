"use strict";

function drawCharts() {
  for (const place of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(place.nextElementSibling.textContent);
    vegaEmbed(place, spec, {ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: {disableDefaultStyle: true}});
  }
}

if (window.vegaEmbed) drawCharts();
