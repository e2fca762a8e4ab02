// Curves over the steps of a chain as inline SVG, from noise on the left to the image on the right.

import { minus, written } from "./formulas.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [320, 130, 40, 6, 8, 18];
const root = (table) => table.map(Math.sqrt);

// The curves of each chart, and its caption at index i of a chain. The ids are those of figures in the page.
const CHARTS = {
  betas: {
    title: "β at each step",
    curves: [(chain) => chain.betas],
    caption: (chain, i) => `<i>β<sub>t</sub></i> = ${written(chain.betas[i])}, the noise of a step`,
  },
  signal: {
    title: "The shares of image and noise at each step",
    curves: [(chain) => root(chain.alphas_cumprod), (chain) => root(chain.one_minus_alphas_cumprod)],
    caption: (chain, i) =>
      `<span class="c0">√<i>ᾱ<sub>t</sub></i> = ${written(Math.sqrt(chain.alphas_cumprod[i]))}, the image</span><br>` +
      `<span class="c1">√(1−<i>ᾱ<sub>t</sub></i>) = ${written(Math.sqrt(chain.one_minus_alphas_cumprod[i]))}, the noise</span>`,
  },
  snr: {
    title: "The ratio of signal to noise at each step",
    curves: [(chain) => chain.snr],
    caption: (chain, i) => `SNR = <i>ᾱ<sub>t</sub></i>/(1−<i>ᾱ<sub>t</sub></i>) = ${written(chain.snr[i])}`,
    isLog: true,
  },
};

export function makeCharts() {
  return Object.entries(CHARTS).map(([id, chart]) => new Chart(document.getElementById(id), chart));
}

class Chart {
  constructor(figure, { title, curves, caption, isLog = false }) {
    Object.assign(this, { curves, caption, isLog });
    figure.innerHTML = `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${title}"></svg><figcaption></figcaption>`;
    [this.svg, this.text] = figure.children;
  }

  draw(chain) {
    this.chain = chain;
    const scale = this.isLog ? (value) => Math.log10(Math.max(value, 1e-9)) : (value) => value;
    this.values = this.curves.map((table) => table(chain).map(scale));
    const all = this.values.flat();
    const [low, high] = this.isLog ? [Math.floor(Math.min(...all)), Math.ceil(Math.max(...all))] : [0, Math.max(...all)];
    const last = chain.timesteps.length - 1;
    const [right, bottom] = [WIDTH - RIGHT, HEIGHT - BOTTOM];
    this.x = (i) => LEFT + ((right - LEFT) * (last - i)) / Math.max(last, 1);
    this.y = (value) => bottom - ((bottom - TOP) * (value - low)) / (high - low || 1);
    const name = (value) => (this.isLog ? `10<tspan class="power" dy="-4">${minus(value)}</tspan>` : Number(value.toPrecision(2)));
    const label = (x, y, anchor, text) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;
    const path = (values) => values.map((value, i) => `${this.x(i).toFixed(1)} ${this.y(value).toFixed(1)}`).join("L");
    this.svg.innerHTML = [
      `<path class="axis" d="M${LEFT} ${TOP}V${bottom}H${right}"/>`,
      label(LEFT - 4, this.y(high) + 5, "end", name(high)),
      label(LEFT - 4, this.y(low), "end", name(low)),
      label(LEFT, HEIGHT - 4, "start", `t = ${chain.timesteps[last]}`),
      label(right, HEIGHT - 4, "end", `t = ${chain.timesteps[0]}`),
      ...this.values.map((values, c) => `<path class="curve c${c}" d="M${path(values)}"/>`),
      '<path class="marker" d=""/>',
      ...this.values.map((_, c) => `<circle class="c${c}" r="4"/>`),
    ].join("");
    this.mark(last);
  }

  mark(i) {
    const x = this.x(i).toFixed(1);
    this.svg.querySelector(".marker").setAttribute("d", `M${x} ${TOP}V${HEIGHT - BOTTOM}`);
    this.svg.querySelectorAll("circle").forEach((circle, c) => {
      circle.setAttribute("cx", x);
      circle.setAttribute("cy", this.y(this.values[c][i]).toFixed(1));
    });
    this.text.innerHTML = this.caption(this.chain, i);
  }
}
