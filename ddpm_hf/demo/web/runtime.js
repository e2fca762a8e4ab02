// A worker that computes the network with onnxruntime-web, so that the page answers while it does.

const opened = open();
opened.catch(() => {}); // the answer to each message says it

onmessage = async ({ data: { id, x, shape, t, labels, guidance } }) => {
  try {
    const { ort, session } = await opened;
    if (!x) return postMessage({ id });
    const inputs = {
      sample: new ort.Tensor("float32", x, shape),
      timestep: new ort.Tensor("float32", [t], [1]),
      class_labels: labels && new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]),
      guidance_scale: new ort.Tensor("float32", [guidance], []),
    };
    const taken = Object.fromEntries(session.inputNames.map((name) => [name, inputs[name]]));
    const { prediction } = await session.run(taken);
    postMessage({ id, output: prediction.data });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};

async function open() {
  const { version, files } = await (await load("runtime.json")).json();
  const [code, binary] = Object.entries(files).map(([name, integrity]) => loadRuntime(name, version, integrity));
  const model = load("model.onnx").then((response) => response.arrayBuffer());
  const module = new Blob([await (await code).text()], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(module));
  ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
  ort.env.wasm.wasmBinary = await (await binary).arrayBuffer();
  return { ort, session: await ort.InferenceSession.create(await model, { executionProviders: ["wasm"] }) };
}

// A file of onnxruntime-web: this site's copy, or the CDN's. The browser refuses one with another hash.
async function loadRuntime(name, version, integrity) {
  try {
    return await load(`vendor/${name}`, { integrity });
  } catch {
    const address = `https://cdn.jsdelivr.net/npm/onnxruntime-web@${version}/dist/${name}`;
    return load(address, { integrity, referrerPolicy: "no-referrer" });
  }
}

async function load(address, options) {
  const response = await fetch(address, options).catch((error) => {
    throw new Error(`${address} could not be loaded (${error.message})`);
  });
  if (!response.ok) throw new Error(`${address} could not be loaded (${response.status})`);
  return response;
}
