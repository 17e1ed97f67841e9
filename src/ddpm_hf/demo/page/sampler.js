// The sampler of ddpm-hf for any JavaScript: random numbers, coefficients and the step. No imports, no state.
// The contract is docs/pages/demo.md of ddpm-hf; `model` is the content of sampler.json throughout.

// --- random numbers: Philox4x32-10 and Box-Muller (ddpm_hf/sampling/philox.py) ---------------------------------------

function multiply(a, b) {
  // The high and the low word of a product of two words.
  const [aLow, aHigh, bLow, bHigh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16];
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const high = aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(((middle % 65536) + aLow * bHigh) / 65536);
  return [high >>> 0, Math.imul(a, b) >>> 0];
}

export function philox4x32(counter, key) {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const [aHigh, aLow] = multiply(0xd2511f53, c0);
    const [bHigh, bLow] = multiply(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [(bHigh ^ c1 ^ k0) >>> 0, bLow, (aHigh ^ c3 ^ k1) >>> 0, aLow];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

// Write draw `draw` of the image with this seed (a BigInt) into values[offset … offset + count - 1].
export function drawNormal(seed, draw, values, offset, count) {
  const key = [Number(seed & 0xffffffffn), Number(seed >> 32n)];
  for (let e = 0; e < count; e += 4) {
    const r = philox4x32([e / 4, draw, 0, 0], key);
    for (let j = 0; j < 4 && e + j < count; j += 2) {
      const radius = Math.sqrt(-2 * Math.log((r[j] + 1) / 2 ** 32));
      const angle = r[j + 1] * ((2 * Math.PI) / 2 ** 32);
      values[offset + e + j] = radius * Math.cos(angle);
      if (e + j + 1 < count) values[offset + e + j + 1] = radius * Math.sin(angle);
    }
  }
}

// --- the trajectory ---------------------------------------------------------------------------------------------------

function roundHalfToEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

export function timesteps(model, steps, spacing) {
  const T = model.process.betas.length;
  const indices = Array.from({ length: steps }, (_, i) => i);
  if (spacing === "linspace") {
    const step = steps > 1 ? (1 - T) / (steps - 1) : 0;
    return indices.map((i) => (steps > 1 && i === steps - 1 ? 0 : roundHalfToEven(i * step + (T - 1))));
  }
  if (spacing === "optimal") return leastCostTimesteps(model, steps);
  if (spacing === "trailing") return indices.map((i) => roundHalfToEven(T - i * (T / steps)) - 1);
  return indices.map((i) => (steps - 1 - i) * Math.floor(T / steps) + model.process.steps_offset);
}

// log ᾱ_t for each t.
function logAlphas(model) {
  let sum = 0;
  return model.process.betas.map((beta) => (sum += Math.log1p(-beta)));
}

// The trajectory from T - 1 to 0 of a calibrated model whose steps cost least together, by dynamic programming; a step
// t → s costs ½ ln(σ*² / β̃) (ddpm_hf/diffusion/ddpm_few_steps.py).
function leastCostTimesteps(model, steps) {
  const [logs, T] = [logAlphas(model), model.process.betas.length];
  const cost = (t, s) => {
    const beta = -Math.expm1(logs[t] - logs[s]); // c_0² e_t / β̃ = ᾱ_s β e_t / ((1 - ᾱ_t) (1 - ᾱ_s))
    return 0.5 * Math.log1p((Math.exp(logs[s]) * beta * model.process.x_0_error[t]) / (Math.expm1(logs[t]) * Math.expm1(logs[s])));
  };
  if (steps === 1) return [T - 1];
  const costs = logs.map((_, t) => Float64Array.from({ length: t }, (_, s) => cost(t, s)));
  let best = logs.map((_, t) => (t === 0 ? 0 : Infinity)); // of the paths from t down to 0 with so many edges
  const stops = [];
  for (let edge = 1; edge < steps; edge++) {
    const [next, stop] = [Array(T).fill(Infinity), Array(T).fill(0)];
    for (let t = 1; t < T; t++) {
      for (let s = 0; s < t; s++) {
        const total = costs[t][s] + best[s];
        if (total < next[t]) [next[t], stop[t]] = [total, s];
      }
    }
    best = next;
    stops.push(stop);
  }
  const path = [T - 1];
  for (const stop of stops.reverse()) path.push(stop[path.at(-1)]);
  return path;
}

// One row per network call, as in `trajectory.steps` of sampler.json (ddpm_hf/export/sampler_table.py).
export function makeSteps(model, { steps, spacing, eta, order }) {
  const grid = timesteps(model, steps, spacing);
  const logs = logAlphas(model);
  const logAlpha = (t) => (t < 0 ? 0 : logs[t]); // log ᾱ_t
  const logSnr = (t) => logAlpha(t) - Math.log(-Math.expm1(logAlpha(t)));
  const isLimited = model.clip !== null || model.threshold !== null;
  return grid.map((t, i) => {
    const s = i + 1 < grid.length ? grid[i + 1] : -1;
    const [logT, logS] = [logAlpha(t), logAlpha(s)];
    const [signal, noise] = [Math.exp(logT / 2), Math.sqrt(-Math.expm1(logT))];
    const beta = -Math.expm1(logT - logS);
    const betaTilde = (Math.expm1(logS) / Math.expm1(logT)) * beta;
    const fromX0 = { sample: [0, 1], v_prediction: [signal, -noise], epsilon: [1 / signal, -noise / signal] };
    const [xFromX, xFromOutput] = fromX0[model.prediction_type];
    // q(x_s | x_t, x_0), for any eta.
    const c = Math.sqrt(Math.max((-Math.expm1(logS) - eta ** 2 * betaTilde) / -Math.expm1(logT), 0));
    const mean0 = s < 0 ? 1 : Math.exp(logS / 2) - c * signal;
    const row = { t, x_0_from_x_t: xFromX, x_0_from_output: xFromOutput, mean_from_x_0: mean0,
                  mean_from_x_t: s < 0 ? 0 : c, extrapolation: 0 };
    if (order === 2 && i > 0 && s >= 0) {
      const ratio = (0.5 * (logSnr(s) - logSnr(t))) / (logSnr(t) - logSnr(grid[i - 1]));
      row.extrapolation = Math.min(ratio, 1);
    }
    const scale = s < 0 ? 0 : eta;
    if (model.variance_type.startsWith("learned")) {
      Object.assign(row, { noise_scale: scale, log_variance_low: Math.log(betaTilde), log_variance_high: Math.log(beta) });
      if (s < 0) row.log_variance_low = row.log_variance_high;
    } else if (model.variance_type === "optimal") {
      let variance = eta ** 2 * betaTilde + mean0 ** 2 * model.process.x_0_error[t];
      if (isLimited && i === grid.length - 2) variance = Math.min(variance, -Math.expm1(logS));
      row.std = s < 0 ? 0 : Math.sqrt(variance);
    } else {
      row.std = scale * Math.sqrt(model.variance_type.startsWith("fixed_large") ? beta : betaTilde);
    }
    return row;
  });
}

// --- the step ---------------------------------------------------------------------------------------------------------

function threshold(x, { ratio, max }) {
  const sorted = Float64Array.from(x, Math.abs).sort();
  const place = ratio * (sorted.length - 1);
  const [low, high] = [sorted[Math.floor(place)], sorted[Math.ceil(place)]];
  const limit = Math.min(Math.max(low + (high - low) * (place - Math.floor(place)), 1), max);
  for (let e = 0; e < x.length; e++) x[e] = Math.min(Math.max(x[e], -limit), limit) / limit;
}

// One step for one image. All arrays have C·H·W values; v is what the network says of the variance, or null.
// Changes x to x_s, and returns x̂_0.
export function step(model, row, x, out, v, previous, z) {
  const x0 = new Float32Array(x.length);
  for (let e = 0; e < x.length; e++) x0[e] = row.x_0_from_x_t * x[e] + row.x_0_from_output * out[e];
  if (model.threshold) threshold(x0, model.threshold);
  else if (model.clip) for (let e = 0; e < x.length; e++) x0[e] = Math.min(Math.max(x0[e], -model.clip), model.clip);
  for (let e = 0; e < x.length; e++) {
    let std = row.std;
    if (std === undefined) {
      const [low, high] = [row.log_variance_low, row.log_variance_high];
      const log = model.variance_type === "learned" ? v[e] : low + ((v[e] + 1) / 2) * (high - low);
      std = row.noise_scale * Math.exp(log / 2);
    }
    const ahead = x0[e] + (previous ? row.extrapolation * (x0[e] - previous[e]) : 0);
    x[e] = row.mean_from_x_0 * ahead + row.mean_from_x_t * x[e] + (std === 0 ? 0 : std * z[e]);
  }
  return x0;
}

// [-1, 1] → 0 … 255, rounding half to even as NumPy and PyTorch do.
export function toBytes(x) {
  return Uint8Array.from(x, (value) => roundHalfToEven(Math.min(Math.max((value + 1) / 2, 0), 1) * 255));
}
