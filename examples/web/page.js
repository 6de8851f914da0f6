// Loads an exported detector, finds what is in a picture, and draws it. There is no NMS here, and none in the model.

import { readMetadata } from "./metadata.js";

const LONGEST = 1280; // pixels of a picture's longer side, where the model takes any size
const MISSING = "onnxruntime-web is missing. Run npm ci and npm run build in examples/web, then load this page again.";
const byId = (id) => document.getElementById(id);
const canvas = byId("canvas");

let ort = null;
let model = null; // { session, size, divisor, fill, names }
let picture = null; // an ImageBitmap or a canvas
let work = Promise.resolve(); // one thing after another

window.detections = null; // all that the model found in the picture, best first: { box, score, label, name }

// --- what is shown -------------------------------------------------------------------------------------------------

function say(text) {
  byId("status").textContent = text;
}

function complain(text) {
  byId("error").textContent = text;
  byId("error").hidden = false;
}

function queue(job) {
  work = work.then(async () => {
    byId("error").hidden = true;
    try {
      await job();
    } catch (error) {
      complain(error.message);
      waiting();
    }
  });
}

function waiting() {
  if (!ort) say("The runtime is not there.");
  else if (!model) say("Choose a model.");
  else if (!picture) say("Choose a picture.");
}

const colour = (label) => `hsl(${(label * 137.5) % 360} 85% 33%)`;

function draw() {
  const least = Number(byId("threshold").value);
  byId("value").textContent = least.toFixed(2);
  if (!picture) return;

  // 1. The picture, enlarged if it is small, so that lines and letters are sharp.
  const k = Math.max(1, Math.ceil(960 / Math.max(picture.width, picture.height)));
  canvas.width = k * picture.width;
  canvas.height = k * picture.height;
  byId("empty").hidden = true;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);

  // 2. Its boxes, the best on top.
  const shown = (window.detections ?? []).filter((detection) => detection.score >= least);
  const unit = Math.max(canvas.width, canvas.height) / 640;
  context.lineWidth = 2 * unit;
  context.font = `${12 * unit}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { box, score, label, name } of [...shown].reverse()) {
    const [x1, y1, x2, y2] = box.map((side) => k * side);
    const text = ` ${name} ${score.toFixed(2)} `;
    const wide = context.measureText(text).width;
    const left = Math.max(0, Math.min(x1, canvas.width - wide));
    const top = Math.max(0, y1 - 16 * unit);
    context.strokeStyle = context.fillStyle = colour(label);
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.fillRect(left, top, wide, 16 * unit);
    context.fillStyle = "white";
    context.fillText(text, left, top + 2 * unit);
  }

  // 3. The same in words.
  const rows = shown.map(({ score, label, name }) => {
    const row = document.createElement("li");
    row.style.setProperty("--colour", colour(label));
    for (const text of [name, score.toFixed(2)]) {
      row.append(Object.assign(document.createElement("span"), { textContent: text }));
    }
    return row;
  });
  byId("list").replaceChildren(...rows);
  const count = `${shown.length} of ${window.detections?.length ?? 0} detections shown.`;
  canvas.setAttribute("aria-label", window.detections ? `Picture. ${count}` : "Picture, nothing detected yet");
  if (window.detections) say(count);
}

// --- the model -------------------------------------------------------------------------------------------------------

async function loadModel(bytes, name) {
  // 1. A session.
  if (!ort) throw new Error(MISSING);
  say(`Loading ${name} …`);
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new Error(`${name} is no model that onnxruntime can load: ${error.message}`);
  }

  // 2. Is it one of ours?
  const missing = ["boxes", "scores", "labels"].filter((output) => !session.outputNames.includes(output));
  if (missing.length || session.inputNames.join() !== "images") {
    const outputs = session.outputNames.join(", ");
    throw new Error(`${name} has the outputs ${outputs}. This page needs boxes, scores and labels: use export_onnx.`);
  }
  const [batch, , height, width] = session.inputMetadata[0].shape;
  if (typeof batch === "number" && batch !== 1) {
    throw new Error(`${name} takes ${batch} images at once. Export it with batch_size=1.`);
  }

  // 3. What it says of itself.
  const metadata = readMetadata(bytes);
  const fixed = typeof height === "number" && typeof width === "number";
  const outside = metadata.preprocessing === "outside";
  model = {
    session,
    size: fixed ? [width, height] : null,
    divisor: outside ? Number(metadata.size_divisible ?? 1) : 1,
    fill: JSON.parse(metadata.image_mean ?? "[0.5, 0.5, 0.5]"),
    names: JSON.parse(metadata.class_names ?? "{}"),
  };
  if (metadata.score_threshold) byId("threshold").value = metadata.score_threshold;
  const classes = Object.keys(model.names).length;
  const sizes = fixed ? `pictures become ${width} × ${height}` : "pictures of any size";
  byId("about").textContent = `${name}: ${sizes}, ${classes || "no"} class names.`;
  await detect();
}

// --- the picture -----------------------------------------------------------------------------------------------------

async function loadPicture(file) {
  try {
    picture = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(`${file.name} is no picture that this browser can read.`);
  }
  await detect();
}

function drawExample() {
  const drawn = new OffscreenCanvas(320, 240);
  const context = drawn.getContext("2d");
  context.fillStyle = "#444";
  context.fillRect(0, 0, 320, 240);
  const rectangles = [
    ["#e33", 30, 40, 90, 70],
    ["#3c3", 150, 90, 70, 110],
    ["#46f", 220, 30, 60, 60],
    ["#e33", 60, 150, 60, 50],
  ];
  for (const [fill, ...rectangle] of rectangles) {
    context.fillStyle = fill;
    context.fillRect(...rectangle);
  }
  return drawn;
}

// The picture in a size that the model takes, and by how much it was scaled: (1, 3, H, W) in 0…1.
function tensorOf() {
  // 1. Its place: at the top left, with the model's mean colour around it.
  const { width: w, height: h } = picture;
  const scale = model.size ? Math.min(model.size[0] / w, model.size[1] / h) : Math.min(1, LONGEST / Math.max(w, h));
  const inner = [w, h].map((side) => Math.max(1, Math.round(side * scale)));
  const [width, height] = model.size ?? inner.map((side) => Math.ceil(side / model.divisor) * model.divisor);

  // 2. Pixels; a picture's own see-through parts become white.
  const context = new OffscreenCanvas(...inner).getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, ...inner);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, ...inner);
  const { data } = context.getImageData(0, 0, ...inner);

  // 3. One plane for each colour.
  const planes = new Float32Array(3 * height * width);
  for (let c = 0; c < 3; c++) {
    planes.fill(model.fill[c], c * height * width, (c + 1) * height * width);
    for (let y = 0; y < inner[1]; y++) {
      for (let x = 0; x < inner[0]; x++) {
        planes[(c * height + y) * width + x] = data[4 * (y * inner[0] + x) + c] / 255;
      }
    }
  }
  return { images: new ort.Tensor("float32", planes, [1, 3, height, width]), scale: [inner[0] / w, inner[1] / h] };
}

async function detect() {
  window.detections = null;
  draw();
  if (!ort || !model || !picture) return waiting();
  say("Detecting …");
  await new Promise((resolve) => setTimeout(resolve, 20)); // let the browser paint: the runtime blocks it
  const begun = performance.now();
  const { images, scale } = tensorOf();
  const { boxes, scores, labels } = await model.session.run({ images });
  const clip = (value, side) => Math.min(Math.max(value, 0), side);
  window.detections = Array.from(scores.data, (score, i) => {
    const [x1, y1, x2, y2] = boxes.data.slice(4 * i, 4 * i + 4);
    const label = Number(labels.data[i]);
    const across = [x1, x2].map((x) => clip(x / scale[0], picture.width));
    const down = [y1, y2].map((y) => clip(y / scale[1], picture.height));
    const name = model.names[label] ?? `class ${label}`;
    return { box: [across[0], down[0], across[1], down[1]], score, label, name };
  });
  draw();
  say(`${byId("status").textContent} ${Math.round(performance.now() - begun)} ms.`);
}

// --- what comes in ---------------------------------------------------------------------------------------------------

function take(file) {
  if (!file) return;
  if (file.name.endsWith(".onnx")) queue(async () => loadModel(new Uint8Array(await file.arrayBuffer()), file.name));
  else queue(() => loadPicture(file));
}

async function fetchModel(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`There is no model at ${address} on this server.`);
  await loadModel(new Uint8Array(await answer.arrayBuffer()), address);
}

byId("model").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  if (file) queue(async () => loadModel(new Uint8Array(await file.arrayBuffer()), file.name));
});
byId("picture").addEventListener("change", ({ target }) => take(target.files[0]));
byId("threshold").addEventListener("input", draw);
byId("example").addEventListener("click", () => {
  queue(async () => {
    picture = drawExample();
    await detect();
  });
});
const drop = byId("drop");
for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  drop.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", over);
    if (kind === "drop") [...event.dataTransfer.files].forEach(take);
  });
}

queue(async () => {
  try {
    ort = await import("./vendor/ort.wasm.min.mjs");
  } catch {
    throw new Error(MISSING);
  }
  ort.env.wasm.numThreads = 1; // more would need headers that python -m http.server does not send
  ort.env.wasm.wasmPaths = new URL("vendor/", import.meta.url).href;
  waiting();
});
const address = new URLSearchParams(location.search).get("model");
if (address) queue(() => fetchModel(address));
