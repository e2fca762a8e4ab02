// The page: its controls, and what they show.
//
// One computation runs at a time. Starting another cancels it, and so does a control that changes.

import { makeCharts } from "./charts.js";
import * as diffusion from "./diffusion.js";
import { Drawing } from "./drawing.js";
import { formulas } from "./formulas.js";
import { openModel } from "./model.js";
import { makePictures } from "./pictures.js";

const { denoise, drawEach, gaussian, makeChain, qSample, slerp, spacedTimesteps } = diffusion;
const $ = (id) => document.getElementById(id);
const STEPS = [5, 10, 20, 50, 100, 250, 500, 1000];
const SECONDS_OF_PLAY = 4;
const BETWEEN = 8; // images of an interpolation
const PREDICTED = { epsilon: "the noise ε", sample: "the image x₀", v_prediction: "v, a mix of noise and image" };
const mayMove = !matchMedia("(prefers-reduced-motion: reduce)").matches;

let model, pictures, charts, drawing;
let stage; // {options, chain, frames, steps}: the chain on show, its steps so far, and the generator of the others
let position = 0; // the number of steps behind what is on show
let noised = null; // {x, i}: the drawing with noise, and its index in the chain
let job = 0;

try {
  model = await openModel();
  window.ddpm = { ...model, ...diffusion };
  prepare();
  $("status").textContent = "The model is ready.";
  document.querySelector("main").inert = false;
  if (mayMove) play();
  else scrub(0);
} catch (error) {
  $("status").textContent = "";
  showError(error);
}

// ---------------------------------------------------------------------- one job at a time

// Run work(cancelled), which has to end soon after cancelled() is true. The element is busy meanwhile.
async function run(work, element) {
  const mine = ++job;
  $("play").textContent = "Play";
  $("error").hidden = true;
  for (const busy of document.querySelectorAll("[aria-busy=true]")) busy.ariaBusy = "false";
  if (element) element.ariaBusy = "true";
  try {
    await work(() => mine !== job);
  } catch (error) {
    if (mine === job) showError(error);
  }
  if (element && mine === job) element.ariaBusy = "false";
}

function showError(error) {
  $("error").textContent = `Something went wrong: ${error.message}.`;
  $("error").hidden = false;
}

// ---------------------------------------------------------------------- controls

function prepare() {
  const { name, num_train_timesteps: T, labels, null_class, prediction_type, sample_size } = model.facts;
  const [height, width] = sample_size;
  const classes = labels ? `, ${labels.length} classes` : "";
  $("facts").textContent =
    `${name}: ${width} × ${height} pixels${classes}. Trained with ${T} steps of noise. Predicts ${PREDICTED[prediction_type]}.`;
  $("label").append(...(labels ?? []).map((label) => new Option(className(label), label)));
  if (null_class !== null) $("label").append(new Option("any", null_class));
  $("steps").append(...[...STEPS.filter((n) => n < T), T].map((n) => new Option(n, n)));
  $("steps").value = Math.min(T, 50);
  for (const [kind, isThere] of Object.entries({ conditional: labels !== null, guided: null_class !== null })) {
    for (const element of document.querySelectorAll(`.${kind}`)) element.hidden = !isThere;
  }
  pictures = makePictures(model.facts);
  document.querySelectorAll("canvas").forEach(pictures.clear);
  drawing = new Drawing($("canvas"), $("pen"), model.facts.channels, (pixels) => {
    noised = null;
    pictures.paint($("canvas"), pixels);
  });
  charts = makeCharts();
  newStage();
  $("level").value = stage.chain.timesteps.length >> 1;
  showLevel();
  listen();
}

function listen() {
  const on = (id, event, action) => $(id).addEventListener(event, action);
  for (const id of ["controls", "seeds"]) on(id, "submit", (event) => event.preventDefault());
  on("controls", "input", showValues);
  on("controls", "change", controlsChanged);
  on("another", "click", () => {
    $("seed").value = Math.floor(Math.random() * 10000);
    controlsChanged();
  });
  on("position", "input", () => scrub(Number($("position").value)));
  on("play", "click", () => ($("play").textContent === "Play" ? play() : scrub(position)));
  on("back", "click", () => scrub(Math.max(position - 1, 0)));
  on("forward", "click", () => scrub(Math.min(position + 1, stage.chain.timesteps.length)));
  on("make-ten", "click", makeTen);
  on("clear", "click", () => drawing.clear());
  on("use-guess", "click", () => {
    const frame = stage.frames[indexOfFrame(position)];
    if (frame) drawing.set(frame.x_0);
  });
  on("level", "input", noiseDrawing);
  on("noise", "click", noiseDrawing);
  on("restore", "click", restore);
  on("seeds", "submit", interpolate);
}

function controlsChanged() {
  if (!$("controls").reportValidity()) return;
  const [old, level] = [stage.chain.timesteps.length, $("level").value];
  newStage();
  const steps = stage.chain.timesteps.length;
  $("level").value = Math.round((level * steps) / old);
  noised = null;
  showLevel();
  $("status").textContent = "Denoising …";
  scrub(Math.round((position * steps) / old));
}

function showValues() {
  $("guidance-value").textContent = $("guidance").value === "1" ? "1 (none)" : $("guidance").value;
  $("eta-value").textContent = $("eta").value;
  $("eta-field").hidden = $("sampler").value === "ddpm";
}

function settings() {
  return {
    label: model.facts.labels && Number($("label").value),
    guidance: model.facts.null_class === null ? 1 : Number($("guidance").value),
    seed: Number($("seed").value),
    sampler: $("sampler").value,
    eta: Number($("eta").value),
    steps: Number($("steps").value),
  };
}

function className(label) {
  return model.facts.class_names?.[label] ?? String(label);
}

// The network with the guidance of these options, and a label for each image.
function network(options, labels) {
  return (x, t) => model.predict(x, t, options.label === null ? null : labels, options.guidance);
}

// ---------------------------------------------------------------------- the chain on show

function newStage() {
  showValues();
  const options = settings();
  const { alphas_cumprod, num_train_timesteps: T } = model.facts;
  const chain = makeChain(alphas_cumprod, spacedTimesteps(T, options.steps));
  const stream = gaussian(options.seed);
  const steps = denoise(model.facts, chain, options, stream(model.size), [stream], network(options, [options.label]));
  stage = { options, chain, frames: [], steps };
  $("position").max = chain.timesteps.length;
  $("level").max = chain.timesteps.length - 1;
  for (const chart of charts) chart.draw(chain);
}

// After k steps the sample is the one that the next step starts from; after the last, the one that it gave.
function indexOfFrame(k) {
  return Math.min(k, stage.chain.timesteps.length - 1);
}

// Compute what is missing before position k, and show it there.
async function reach(k, cancelled) {
  const { frames, steps } = stage;
  $("position").value = k;
  while (frames.length <= indexOfFrame(k)) {
    const { value, done } = await steps.next();
    if (done) throw new Error("this chain cannot go on");
    frames.push(value);
    if (cancelled()) return;
    if (mayMove) show(frames.length - 1);
  }
  show(k);
}

function scrub(k) {
  return run(async (cancelled) => {
    await reach(k, cancelled);
    if (!cancelled()) $("status").textContent = describe(k);
  });
}

function play() {
  return run(async (cancelled) => {
    $("play").textContent = "Pause";
    const n = stage.chain.timesteps.length;
    for (let k = position < n ? position : 0; k <= n; k++) {
      const pause = new Promise((resolve) => setTimeout(resolve, (1000 * SECONDS_OF_PLAY) / n));
      await reach(k, cancelled);
      await pause;
      if (cancelled()) return;
    }
    $("play").textContent = "Play";
    $("status").textContent = describe(n);
  });
}

function show(k) {
  position = k;
  const { options, chain, frames } = stage;
  const step = frames[indexOfFrame(k)];
  const t = `t = ${chain.timesteps[step.i]}`;
  const isEnd = k === chain.timesteps.length;
  pictures.paint($("sample"), isEnd ? step.x_prev : step.x_t);
  pictures.paint($("guess"), step.x_0);
  $("where").textContent = isEnd ? "done" : t;
  $("position").ariaValueText = describe(k);
  for (const chart of charts) chart.mark(step.i);
  const next = step.i > 0 ? `t = ${chain.timesteps[step.i - 1]}, which the equations call t − 1` : "the image";
  $("step-text").textContent =
    `From ${t} to ${next}. The network looks at the sample and predicts ${PREDICTED[model.facts.prediction_type]}. ` +
    "The rest is arithmetic, the same for every pixel. z is new noise.";
  const [height, width] = model.facts.sample_size;
  const lines = formulas(model.facts, chain, step, options, (height >> 1) * width + (width >> 1));
  $("formulas").innerHTML = lines.map(([title, math]) => `<h3>${title}</h3>${math}`).join("");
}

function describe(k) {
  const n = stage.chain.timesteps.length;
  return k === n ? `The image after ${n} steps.` : `After ${k} of ${n} steps, t = ${stage.chain.timesteps[n - 1 - k]}.`;
}

// ---------------------------------------------------------------------- several images at once

// Denoise x into canvases, which lie in an element.
function denoiseInto(element, canvases, { x, streams, labels, options, first }) {
  return run(async (cancelled) => {
    $("status").textContent = "Denoising …";
    pictures.paintAll(canvases, x);
    let result;
    for await (const step of denoise(model.facts, stage.chain, options, x, streams, network(options, labels), first)) {
      if (cancelled()) return;
      result = step.x_prev;
      if (mayMove) pictures.paintAll(canvases, result);
    }
    pictures.paintAll(canvases, result);
    $("status").textContent = "Done.";
  }, element);
}

function makeTen() {
  const { options } = stage;
  const classes = model.facts.labels;
  const labels = classes && Array.from({ length: 10 }, (_, i) => classes[i % classes.length]);
  const streams = Array.from({ length: 10 }, (_, i) => gaussian(options.seed, i));
  const captions = streams.map((_, i) => (labels ? className(labels[i]) : `image ${i + 1}`));
  const x = drawEach(streams, model.size);
  return denoiseInto($("ten"), pictures.rowOf($("ten"), captions), { x, streams, labels, options });
}

function interpolate() {
  const options = { ...stage.options, sampler: "ddim", eta: 0 };
  const [a, b] = ["seed-a", "seed-b"].map((id) => gaussian(Number($(id).value))(model.size));
  const weights = Array.from({ length: BETWEEN }, (_, i) => i / (BETWEEN - 1));
  const x = new Float64Array(BETWEEN * model.size);
  weights.forEach((weight, i) => x.set(slerp(a, b, weight), i * model.size));
  const canvases = pictures.rowOf($("between"), weights.map((weight) => `${Math.round(100 * weight)} %`));
  const labels = weights.map(() => options.label);
  return denoiseInto($("between"), canvases, { x, streams: [], labels, options });
}

// ---------------------------------------------------------------------- the drawing

function levelIndex() {
  return stage.chain.timesteps.length - 1 - Number($("level").value);
}

function showLevel() {
  const text = `t = ${stage.chain.timesteps[levelIndex()]}`;
  $("level-value").textContent = $("level").ariaValueText = text;
}

function noiseDrawing() {
  showLevel();
  const i = levelIndex();
  const noise = gaussian(stage.options.seed)(model.size);
  noised = { x: qSample(stage.chain, i, drawing.pixels, noise), i };
  pictures.paint($("noised"), noised.x);
}

function restore() {
  if (!noised) noiseDrawing();
  const { options } = stage;
  const streams = [gaussian(options.seed, 1)]; // other noise than the drawing's
  const work = { x: noised.x, streams, labels: [options.label], options, first: noised.i };
  return denoiseInto($("restored-figure"), [$("restored")], work);
}
