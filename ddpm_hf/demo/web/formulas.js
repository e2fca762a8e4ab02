// The equations of a step as MathML, in symbols and with the step's numbers.

// Each part is a formula of its own, so that the line can break between them.
const line = (...parts) => `<div>${parts.map((part) => `<math displaystyle="true">${part}</math>`).join(" ")}</div>`;
const row = (...parts) => `<mrow>${parts.join("")}</mrow>`;
const variable = (name) => `<mi>${name}</mi>`;
const op = (sign) => `<mo form="infix">${sign}</mo>`; // with space on both sides, at the start of a part too
const bracket = (sign) => `<mo>${sign}</mo>`;
const sub = (base, index) => `<msub>${base}${index}</msub>`;
const marked = (name) => `<mi class="marked">${name}</mi>`; // a letter with a bar or a hat
const root = (...parts) => `<msqrt>${parts.join("")}</msqrt>`;
const fraction = (top, bottom) => `<mfrac>${row(top)}${row(bottom)}</mfrac>`;
const squared = (base, index) => `<msubsup>${base}${index}<mn>2</mn></msubsup>`;

const t = variable("t");
const before = row(t, op("−"), "<mn>1</mn>");
const bar = (index) => sub(marked("ᾱ"), index);
const rest = (index) => row("<mn>1</mn>", op("−"), bar(index));
const x_t = sub(variable("x"), t);
const x_prev = sub(variable("x"), before);
const x_0 = sub(marked("x̂"), "<mn>0</mn>");
const epsilon = marked("ε̂");
const v = marked("v̂");
const sigma = sub(variable("σ"), t);
const z = variable("z");

// A number of about three digits, as text.
export function written(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) {
    const [digits, power] = value.toExponential(1).split("e");
    return `${minus(digits)}·10<sup>${minus(Number(power))}</sup>`;
  }
  return minus(value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 0));
}

export function minus(text) {
  return String(text).replace("-", "−");
}

function number(value) {
  const [digits, power] = written(value).split("·10<sup>");
  return power
    ? row(`<mn>${digits}</mn>`, op("·"), `<msup><mn>10</mn><mn>${power.replace("</sup>", "")}</mn></msup>`)
    : `<mn>${digits}</mn>`;
}

// The terms of a·x + b·y + ...; one whose factor is 0 is left out.
function sum(...terms) {
  return terms
    .filter(([factor]) => factor !== 0)
    .map(([factor, symbol], i) => {
      const sign = factor < 0 ? op("−") : i > 0 ? op("+") : "";
      return row(sign, number(Math.abs(factor)), op("·"), symbol);
    });
}

const inBrackets = (value) => (value < 0 ? row(bracket("("), number(value), bracket(")")) : number(value));

// The network's output by prediction type: its symbol, and how x̂_0 follows from it.
const OUTPUTS = {
  epsilon: [epsilon, [fraction(row(x_t, op("−"), root(rest(t)), epsilon), root(bar(t)))]],
  v_prediction: [v, [row(root(bar(t)), x_t), row(op("−"), root(rest(t)), v)]],
  sample: [x_0, null],
};

// The lines for a step of `reverseStep`: [what it says, MathML] each. `pixel`: the one whose values are shown.
export function formulas(facts, chain, step, options, pixel) {
  const { i, coefficients, x_t: x, x_0: image, epsilon: eps, noise, x_prev: next } = step;
  const [output, prediction] = OUTPUTS[facts.prediction_type];
  const lines = [];
  if (prediction) {
    const signal = Math.sqrt(chain.alphas_cumprod[i]);
    const spread = Math.sqrt(chain.one_minus_alphas_cumprod[i]);
    const [a, b] = facts.prediction_type === "epsilon" ? [1 / signal, -spread / signal] : [signal, -spread];
    const limit = facts.clip_sample_range;
    const clipped = limit === null ? "" : `, clipped to [−${limit}, ${limit}]`;
    const title = `The image that the model expects${clipped}`;
    lines.push([title, equation(x_0, prediction, sum([a, x_t], [b, output]))]);
  }
  const isDDPM = options.sampler === "ddpm";
  const [symbols, other] = isDDPM
    ? [[row(ddpmImage, x_0), row(op("+"), ddpmSample, x_t)], x_t]
    : [[row(root(bar(before)), x_0), row(op("+"), root(rest(before), op("−"), squared(variable("σ"), t)), epsilon)], epsilon];
  const target = i > 0 ? x_prev : sub(variable("x"), "<mn>0</mn>");
  const numbers = sum([coefficients.x_0, x_0], [coefficients.other, other], [coefficients.std, z]);
  lines.push([
    `The step of ${isDDPM ? "DDPM" : "DDIM"}`,
    equation(x_prev, [...symbols, row(op("+"), sigma, z)], numbers, target),
  ]);
  const factors = [
    [coefficients.x_0, inBrackets(image[pixel])],
    [coefficients.other, inBrackets((isDDPM ? x : eps)[pixel])],
    [coefficients.std, inBrackets(noise ? noise[pixel] : 0)],
  ];
  lines.push(["The same for the pixel in the middle", line(...sum(...factors), row(op("="), number(next[pixel])))]);
  return lines;
}

const ddpmImage = fraction(row(root(bar(before)), sub(variable("β"), t)), rest(t));
const ddpmSample = fraction(row(root(sub(variable("α"), t)), bracket("("), rest(before), bracket(")")), rest(t));

// name = symbols, and below it target = numbers.
function equation(name, symbols, numbers, target = name) {
  return line(row(name, op("=")), ...symbols) + line(row(target, op("=")), ...numbers);
}
