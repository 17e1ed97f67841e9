// Samples in a thread of its own, so that the page never freezes.
import { drawNormal, makeSteps, step, toBytes } from "./sampler.js";

const FRAMES = 100; // of a trajectory that are kept
const GOOD_ENOUGH = 50; // ms per step, below which nothing faster is looked for
const NAMES = { webgpu: "WebGPU", wasm: "WebAssembly" };
let ort, session, model;
let current = 0; // the request that is being worked on; another one ends it

async function load(url) {
  const answer = await fetch(url).catch(() => null);
  if (!answer?.ok) throw new Error(`${url} can't be loaded (${answer?.status ?? "no answer"}): reload the page.`);
  return answer;
}

// Binaries lie compressed in the folder: a third of the bytes, from any server.
async function unpack(url) {
  const answer = await load(url);
  if (answer.headers.get("Content-Encoding")?.includes("gzip")) return answer.arrayBuffer(); // the browser has done it
  return new Response(answer.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

// Whether a real graphics processor is there: one that is emulated is slower than WebAssembly.
async function hasGraphics() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter) && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  } catch {
    return false;
  }
}

async function open(wanted) {
  if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") {
    throw new Error("this browser has no WebAssembly or no DecompressionStream: use a release of 2023 or later of " +
      "Chrome, Edge, Firefox or Safari.");
  }
  const [table, weights, isAccelerated] = await Promise.all([
    load("model/sampler.json").then((answer) => answer.json()),
    load("model/model.onnx").then((answer) => answer.arrayBuffer()),
    wanted === "auto" && hasGraphics(),
  ]);
  model = table;
  if (wanted !== "auto") return start(wanted, weights);
  if (!isAccelerated) return start("wasm", weights);
  let graphics;
  try {
    graphics = await start("webgpu", weights, true);
    if (graphics.ms < GOOD_ENOUGH) return graphics;
  } catch {
    return start("wasm", weights);
  }
  const plain = await start("wasm", weights, true);
  return plain.ms < graphics.ms ? plain : start("webgpu", weights);
}

const pixels = () => model.image.channels * model.image.height * model.image.width;

async function start(backend, weights, isTimed = false) {
  const name = backend === "webgpu" ? "ort-wasm-simd-threaded.asyncify" : "ort-wasm-simd-threaded";
  const here = new URL("./onnxruntime/", self.location.href).href;
  let binary;
  [ort, binary] = await Promise.all([
    import(`./onnxruntime/${backend === "webgpu" ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`),
    unpack(`${here}${name}.wasm.gz`),
  ]);
  ort.env.wasm.wasmPaths = { mjs: `${here}${name}.mjs` };
  ort.env.wasm.wasmBinary = binary;
  // Several threads need memory that they share, which browsers allow only to isolated pages.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency ?? 1) : 1;
  ort.env.logLevel = "error";
  // A graph that was optimized when the page was made starts sooner if the code that optimizes is never compiled.
  const graphOptimizationLevel = backend === "wasm" && model.model.is_optimized ? "disabled" : "all";
  try {
    session = await ort.InferenceSession.create(weights, {
      executionProviders: [backend], graphOptimizationLevel, logSeverityLevel: 3,
    });
    const trial = () => predict(new Float32Array(pixels()), [0n], [0n]);
    await trial();
    if (!isTimed) return { backend };
    const started = performance.now();
    await trial();
    return { backend, ms: performance.now() - started };
  } catch (error) {
    const other = backend === "webgpu" ? " Choose WebAssembly." : "";
    throw new Error(`this browser can't compute the network by ${NAMES[backend]} (${error.message ?? error}).${other}`);
  }
}

async function predict(x, t, labels) {
  const { channels, height, width } = model.image;
  const feeds = {
    x: new ort.Tensor("float32", x, [t.length, channels, height, width]),
    t: new ort.Tensor("int64", BigInt64Array.from(t), [t.length]),
  };
  if (model.num_classes) feeds.class_labels = new ort.Tensor("int64", BigInt64Array.from(labels), [t.length]);
  const { prediction } = await session.run(feeds);
  const values = await prediction.getData();
  prediction.dispose();
  return values;
}

// The prediction of each image and, if it is learned, its variance; with guidance, from twice the images.
async function guided(x, t, labels, scale) {
  const [count, size] = [labels.length, pixels()];
  const isGuided = model.num_classes && scale !== 1;
  const all = isGuided ? new Float32Array(2 * x.length) : x;
  if (isGuided) all.set(x), all.set(x, x.length);
  const allLabels = isGuided ? [...labels, ...labels.map(() => BigInt(model.null_class))] : labels;
  const values = await predict(all, allLabels.map(() => BigInt(t)), allLabels);
  const stride = values.length / allLabels.length;
  return labels.map((_, i) => {
    const out = Float32Array.from(values.subarray(i * stride, i * stride + size));
    const v = stride > size ? values.subarray(i * stride + size, (i + 1) * stride) : null;
    if (isGuided) {
      const nothing = values.subarray((count + i) * stride, (count + i) * stride + size);
      for (let e = 0; e < size; e++) out[e] = nothing[e] + scale * (out[e] - nothing[e]);
    }
    return { out, v };
  });
}

const pause = () => new Promise((go) => {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => (port1.close(), go());
  port2.postMessage(0);
});

async function sample({ id, seed, count, labels, guidance, ...trajectory }) {
  const [size, rows, first] = [pixels(), makeSteps(model, trajectory), BigInt(seed)];
  const every = Math.ceil(rows.length / FRAMES);
  const frames = Math.ceil(rows.length / every) + ((rows.length - 1) % every ? 1 : 0);
  const x = new Float32Array(count * size);
  const z = new Float32Array(size);
  const labelled = labels.map(BigInt);
  const previous = Array(count).fill(null);
  for (let i = 0; i < count; i++) drawNormal(first + BigInt(i), 0, x, i * size, size);
  const started = performance.now();
  for (let n = 0; n < rows.length; n++) {
    const outputs = await guided(x, rows[n].t, labelled, guidance);
    const x0 = new Float32Array(x.length);
    for (let i = 0; i < count; i++) {
      const needsNoise = rows[n].std === undefined ? rows[n].noise_scale > 0 : rows[n].std > 0;
      if (needsNoise) drawNormal(first + BigInt(i), n + 1, z, 0, size);
      const { out, v } = outputs[i];
      previous[i] = step(model, rows[n], x.subarray(i * size, (i + 1) * size), out, v, previous[i], z);
      x0.set(previous[i], i * size);
    }
    if (x.some(Number.isNaN)) throw new Error("the network overflows here and gives NaN: choose WebAssembly.");
    await pause(); // for a message that stops this
    if (id !== current) return postMessage({ type: "stopped", id });
    const isLast = n === rows.length - 1;
    if (isLast || n % every === 0) {
      const frame = { type: "frame", id, n: n + 1, of: rows.length, frames, t: rows[n].t, x: toBytes(x), x0: toBytes(x0),
                      ms: (performance.now() - started) / (n + 1) };
      postMessage(frame, [frame.x.buffer, frame.x0.buffer]);
    }
  }
  postMessage({ type: "done", id, seconds: (performance.now() - started) / 1000 });
}

// One piece of work at a time, in the order of the requests.
let last = Promise.resolve();
onmessage = ({ data }) => {
  current = data.id;
  const work = { open: async () => {
                   const { backend } = await open(data.backend);
                   postMessage({ type: "ready", id: data.id, backend, model, threads: ort.env.wasm.numThreads });
                 },
                 sample: () => sample(data), stop: () => {} }[data.type];
  last = last.then(work).catch((error) => postMessage({ type: "error", id: data.id, text: String(error.message ?? error) }));
};
