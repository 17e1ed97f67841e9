// The page: options in, images out. All computation is in worker.js.
const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const NAMES = { webgpu: "WebGPU", wasm: "WebAssembly" };
let model, facts;
let request = 0; // the newest one; answers to older ones are ignored
let run = null; // what is shown: { options, frames, isDone }
let player = null;

const send = (type, options = {}) => worker.postMessage({ type, id: ++request, ...options });

function report(text, isError = false) {
  $("error").hidden = !isError;
  if (isError) $("error").textContent = `This did not work: ${text}`;
  $("status").textContent = isError ? "" : text;
}

function setBusy(isBusy) {
  for (const id of ["sample", "again"]) $(id).disabled = !model;
  $("stop").disabled = !isBusy;
}

// --- options -----------------------------------------------------------------------------------------------------------

function prepare() {
  $("steps").max = model.process.betas.length;
  $("steps").value = Math.min($("steps").value, model.process.betas.length);
  $("steps").closest("label").firstChild.textContent = `Steps, at most ${model.process.betas.length} `;
  if (model.process.x_0_error && $("spacing").options.length === 3) $("spacing").add(new Option("optimal"));
  if (model.num_classes && !$("label").options.length) {
    for (const element of document.querySelectorAll(".classes")) element.hidden = false;
    $("label").add(new Option("all, in turn", "all"));
    for (let i = 0; i < model.num_classes; i++) {
      const isNull = i === model.null_class && model.class_names.length === i;
      $("label").add(new Option(model.class_names[i] ?? (isNull ? `${i} (none)` : String(i)), i));
    }
  }
}

function readOptions() {
  const [count, named] = [Number($("count").value), model.class_names.length || model.num_classes];
  const label = (i) => ($("label").value === "all" ? i % named : Number($("label").value));
  return {
    seed: String(BigInt($("seed").value)), count, steps: Number($("steps").value), spacing: $("spacing").value,
    eta: Number($("eta").value), order: Number($("order").value), guidance: model.num_classes ? Number($("guidance").value) : 1,
    labels: Array.from({ length: count }, (_, i) => (model.num_classes ? label(i) : 0)),
  };
}

function sample() {
  if (!model || !$("options").reportValidity()) return;
  clearInterval(player);
  run = { options: readOptions(), frames: [], isDone: false };
  layOut();
  setBusy(true);
  report(`Sampling with ${facts}…`);
  send("sample", run.options);
}

// --- images ------------------------------------------------------------------------------------------------------------

function layOut() {
  const { count, seed, labels } = run.options;
  $("result").hidden = false;
  $("images").replaceChildren();
  for (let i = 0; i < count; i++) {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const [name, kind] = [`seed ${BigInt(seed) + BigInt(i)}`, model.num_classes ? nameOf(labels[i]) : ""];
    Object.assign(canvas, { width: model.image.width, height: model.image.height });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Image with ${name}${kind && `, class ${kind}`}`);
    const caption = document.createElement("figcaption");
    caption.append(name, kind && ` · ${kind}`);
    figure.append(canvas, caption);
    $("images").append(figure);
  }
}

const nameOf = (label) => model.class_names[label] ?? String(label);

function paint(index) {
  const frame = run.frames[index];
  if (!frame) return;
  const { channels, height, width } = model.image;
  const bytes = frame[document.querySelector("input[name=view]:checked").value];
  const area = height * width;
  document.querySelectorAll("#images canvas").forEach((canvas, i) => {
    const rgba = new ImageData(width, height);
    for (let p = 0; p < area; p++) {
      for (let c = 0; c < 3; c++) rgba.data[4 * p + c] = bytes[(i * channels + (channels < 3 ? 0 : c)) * area + p];
      rgba.data[4 * p + 3] = 255;
    }
    canvas.getContext("2d").putImageData(rgba, 0, 0);
  });
  $("frame").max = frame.frames - 1;
  $("frame").value = index;
  const place = `after step ${frame.n} of ${frame.of} (t = ${frame.t})`;
  $("place").textContent = place;
  $("frame").setAttribute("aria-valuetext", place);
}

function download() {
  const { height, width } = model.image;
  const canvases = [...document.querySelectorAll("#images canvas")];
  const columns = Math.ceil(Math.sqrt(canvases.length));
  const grid = document.createElement("canvas");
  Object.assign(grid, { width: columns * width, height: Math.ceil(canvases.length / columns) * height });
  canvases.forEach((canvas, i) => {
    grid.getContext("2d").drawImage(canvas, (i % columns) * width, Math.floor(i / columns) * height);
  });
  $("download").href = grid.toDataURL("image/png");
  $("download").download = `seed-${run.options.seed}.png`;
}

// --- events ------------------------------------------------------------------------------------------------------------

worker.onmessage = ({ data }) => {
  if (data.id !== request) return;
  if (data.type === "ready") {
    model = data.model;
    facts = NAMES[data.backend] + (data.backend === "wasm" ? `, ${data.threads} thread${data.threads > 1 ? "s" : ""}` : "");
    document.body.dataset.backend = data.backend;
    prepare();
    sample();
  } else if (data.type === "frame") {
    run.frames.push(data);
    paint(run.frames.length - 1);
    report(`Step ${data.n} of ${data.of} with ${facts}: ${data.ms.toFixed(1)} ms per step.`);
  } else if (data.type === "done") {
    run.isDone = true;
    const [last, { count, steps }] = [run.frames.at(-1), run.options];
    report(`${count} image${count > 1 ? "s" : ""} of ${steps} steps in ${data.seconds.toFixed(2)} s with ${facts}: ` +
      `${last.ms.toFixed(1)} ms per step.`);
    setBusy(false);
  } else if (data.type === "error") {
    setBusy(false);
    report(data.text, true);
  }
};
worker.onerror = (event) => report(event.message || "the worker did not start: open this page by http, not as a file.", true);

$("options").addEventListener("submit", (event) => (event.preventDefault(), sample()));
$("again").addEventListener("click", () => {
  if (!$("seed").reportValidity()) return;
  $("seed").value = Number($("seed").value) + Number($("count").value);
  sample();
});
$("stop").addEventListener("click", () => {
  send("stop");
  setBusy(false);
  report("Stopped.");
});
$("backend").addEventListener("change", () => {
  model = null;
  setBusy(false);
  report("Loading the model…");
  send("open", { backend: $("backend").value });
});
$("frame").addEventListener("input", () => (clearInterval(player), paint(Math.min($("frame").value, run.frames.length - 1))));
for (const radio of document.querySelectorAll("input[name=view]")) {
  radio.addEventListener("change", () => paint(Number($("frame").value)));
}
$("play").addEventListener("click", () => {
  clearInterval(player);
  let index = 0;
  player = setInterval(() => {
    paint(index);
    if (++index >= run.frames.length) clearInterval(player);
  }, 40);
});
$("download").addEventListener("click", download);
send("open", { backend: "auto" });
