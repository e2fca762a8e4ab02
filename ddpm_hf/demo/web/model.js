// The model of this site: what model.json says of it, and its network, which a worker computes.

export async function openModel() {
  if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, which computes the network");
  const response = await fetch("model.json");
  if (!response.ok) throw new Error(`model.json could not be loaded (${response.status})`);
  const facts = await response.json();
  const call = startWorker();
  await call({}); // answered when the network is there
  const image = [facts.channels, ...facts.sample_size];
  const size = image.reduce((product, length) => product * length);

  // The network's output for samples x at timestep t. labels: one for each image; null: no class.
  async function predict(x, t, labels = null, guidance = 1) {
    const number = x.length / size;
    if (facts.labels && !labels) {
      if (facts.null_class === null) throw new Error("this model needs a label for each image");
      labels = Array(number).fill(facts.null_class);
    }
    return call({ x: Float32Array.from(x), shape: [number, ...image], t, labels, guidance });
  }
  return { facts, size, predict };
}

// A function that sends the worker a message, and returns a promise of its answer.
function startWorker() {
  const worker = new Worker(new URL("runtime.js", import.meta.url), { type: "module" });
  const waiting = new Map();
  let last = 0;
  worker.onmessage = ({ data }) => {
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error === undefined) resolve(data.output);
    else reject(new Error(data.error));
  };
  worker.onerror = (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "the worker could not be started"));
    waiting.clear();
  };
  return (message) =>
    new Promise((resolve, reject) => {
      waiting.set(++last, { resolve, reject });
      worker.postMessage({ id: last, ...message });
    });
}
