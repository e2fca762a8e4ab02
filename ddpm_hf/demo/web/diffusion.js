// The mathematics of the page: a chain, its steps and its random numbers. Knows neither the page nor the network.
//
// Names are those of the library's GaussianDiffusion, and equation numbers those of docs/derivation.md. Index 0 of a table
// is the step that gives x_0. Samples are Float64Array, with the images of a batch one after another.

// n of the timesteps 0..T−1, descending from T−1 ("trailing" in Lin et al. 2023, table 2).
export function spacedTimesteps(T, n) {
  return Array.from({ length: n }, (_, i) => roundHalfToEven(T + i * (T - T / n - T)) - 1);
}

function roundHalfToEven(x) {
  const rounded = Math.round(x);
  return x % 1 === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

// The tables of the chain that visits `timesteps` of a model with these ᾱ_t. Its β follow from the ratios of ᾱ.
export function makeChain(alphas_cumprod, timesteps) {
  const kept = [...timesteps].sort((s, t) => s - t);
  const bars = kept.map((t) => alphas_cumprod[t]);
  const previous = [1, ...bars.slice(0, -1)];
  const table = (f) => bars.map((bar, i) => f(bar, previous[i]));
  // 1 − ᾱ needs no sum of β here: in float64 the difference is exact for ᾱ ≥ ½, where digits could be lost.
  return {
    timesteps: kept,
    alphas_cumprod: bars,
    alphas_cumprod_prev: previous,
    one_minus_alphas_cumprod: table((bar) => 1 - bar),
    snr: table((bar) => bar / (1 - bar)),
    alphas: table((bar, prev) => bar / prev),
    betas: table((bar, prev) => (prev - bar) / prev),
    posterior_variance: table((bar, prev) => (((1 - prev) / (1 - bar)) * (prev - bar)) / prev),
    posterior_mean_coef_x_0: table((bar, prev) => (prev - bar) / Math.sqrt(prev) / (1 - bar)),
    posterior_mean_coef_x_t: table((bar, prev) => (Math.sqrt(bar / prev) * (1 - prev)) / (1 - bar)),
  };
}

// x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·z (eq. 2).
export function qSample(chain, i, x_0, noise) {
  return combine(Math.sqrt(chain.alphas_cumprod[i]), x_0, Math.sqrt(chain.one_minus_alphas_cumprod[i]), noise);
}

// x_0 and ε from the network's output (eq. 9, and v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0).
export function predictions(chain, i, prediction_type, x_t, output) {
  const signal = Math.sqrt(chain.alphas_cumprod[i]);
  const noise = Math.sqrt(chain.one_minus_alphas_cumprod[i]);
  switch (prediction_type) {
    case "epsilon":
      return { x_0: combine(1 / signal, x_t, -noise / signal, output), epsilon: Float64Array.from(output) };
    case "sample":
      return { x_0: Float64Array.from(output), epsilon: combine(1 / noise, x_t, -signal / noise, output) };
    case "v_prediction":
      return { x_0: combine(signal, x_t, -noise, output), epsilon: combine(noise, x_t, signal, output) };
  }
  throw new Error(`prediction_type must be epsilon, sample or v_prediction, got ${prediction_type}.`);
}

// What a step is made of: x_{t−1} = x_0·x̂_0 + other·y + std·z. For DDPM y is x_t (eqs. 7 and 11). For DDIM y is ε̂, and η is
// the amount of noise (Song et al. 2021, eqs. 12 and 16).
export function stepCoefficients(chain, i, { sampler, eta = 0, variance_type = "fixed_small" }) {
  const variance = chain.posterior_variance[i];
  if (sampler === "ddpm") {
    const used = variance_type.startsWith("fixed_large") ? chain.betas[i] : variance;
    const { posterior_mean_coef_x_0: x_0, posterior_mean_coef_x_t: other } = chain;
    return { x_0: x_0[i], other: other[i], std: i > 0 ? Math.sqrt(used) : 0 };
  }
  const left = 1 - chain.alphas_cumprod_prev[i];
  // 1 − ᾱ_{t−1} − η²·β̃_t as a sum of terms that are not negative.
  const kept = 1 - eta ** 2 + (eta ** 2 * chain.alphas[i] * left) / chain.one_minus_alphas_cumprod[i];
  return {
    x_0: Math.sqrt(chain.alphas_cumprod_prev[i]),
    other: Math.sqrt(left * kept),
    std: eta * Math.sqrt(variance),
  };
}

// One step from x_t with the network's output. `facts` are those of model.json; `noise` may be null where std is 0.
export function reverseStep(facts, chain, i, options, x_t, output, noise) {
  const { x_0, epsilon } = predictions(chain, i, facts.prediction_type, x_t, output);
  const limit = facts.clip_sample_range ?? Infinity;
  const clipped = x_0.map((value) => Math.min(Math.max(value, -limit), limit));
  const coefficients = stepCoefficients(chain, i, { variance_type: facts.variance_type, ...options });
  const mean = combine(coefficients.x_0, clipped, coefficients.other, options.sampler === "ddpm" ? x_t : epsilon);
  const x_prev = coefficients.std > 0 ? combine(1, mean, coefficients.std, noise) : mean;
  return { i, x_t, output, x_0: clipped, epsilon, noise, coefficients, x_prev };
}

// Every step of a chain from x_t at index `first` on: the objects of `reverseStep`, one after another.
//
// options: sampler ("ddpm" or "ddim") and eta. streams: a stream of `gaussian` for each image. predict(x_t, t): a promise of
// the network's output.
export async function* denoise(facts, chain, options, x_t, streams, predict, first = chain.timesteps.length - 1) {
  for (let i = first; i >= 0; i--) {
    const output = await predict(x_t, chain.timesteps[i]);
    const { std } = stepCoefficients(chain, i, { variance_type: facts.variance_type, ...options });
    const noise = std > 0 ? drawEach(streams, x_t.length / streams.length) : null;
    const step = reverseStep(facts, chain, i, options, x_t, output, noise);
    yield step;
    x_t = step.x_prev;
  }
}

// Between x and y on the circle, w from 0 to 1. It keeps the length of Gaussian noise, which a straight line does not.
export function slerp(x, y, w) {
  const cosine = dot(x, y) / Math.sqrt(dot(x, x) * dot(y, y));
  const angle = Math.acos(Math.min(Math.max(cosine, -1), 1));
  const sine = Math.sin(angle);
  if (sine < 1e-4) return combine(1 - w, x, w, y); // parallel: the circle is undefined, or the same as the line
  return combine(Math.sin((1 - w) * angle) / sine, x, Math.sin(w * angle) / sine, y);
}

// A stream of Gaussian numbers for each seed and index: stream(n) gives the next n. The generator is sfc32 of Chris
// Doty-Humphrey (PractRand); Box and Muller make its numbers Gaussian.
export function gaussian(seed, index = 0) {
  let [a, b, c, counter] = [0, seed | 0, index | 0, 1];
  const next = () => {
    const sum = (a + b + counter++) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (((c << 21) | (c >>> 11)) + sum) | 0;
    return sum >>> 0;
  };
  for (let i = 0; i < 12; i++) next();
  return (n) => {
    const z = new Float64Array(n);
    for (let i = 0; i < n; i += 2) {
      const radius = Math.sqrt(-2 * Math.log((next() + 1) / 2 ** 32));
      const angle = (2 * Math.PI * next()) / 2 ** 32;
      z[i] = radius * Math.cos(angle);
      if (i + 1 < n) z[i + 1] = radius * Math.sin(angle);
    }
    return z;
  };
}

// The next n numbers of each stream, one stream after another.
export function drawEach(streams, n) {
  const z = new Float64Array(streams.length * n);
  streams.forEach((stream, i) => z.set(stream(n), i * n));
  return z;
}

function combine(a, x, b, y) {
  return Float64Array.from(x, (value, i) => a * value + b * y[i]);
}

function dot(x, y) {
  return x.reduce((sum, value, i) => sum + value * y[i], 0);
}
