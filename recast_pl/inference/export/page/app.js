"use strict";
const [task, drop, file, shown, camera, video, error, status_, classes] =
  ["task", "drop", "file", "shown", "camera", "video", "error", "status", "classes"].map(id => document.getElementById(id));
const percent = share => (100 * share).toFixed(1) + " %";
const KINDS = {F32: ["float32", Float32Array], U8: ["uint8", Uint8Array], I32: ["int32", Int32Array], I64: ["int64", BigInt64Array]};
const tasks = new Map();  // inputs of the graph and class names, by name
let about, session, image = null, running = Promise.resolve();

ort.env.wasm.numThreads = 1;  // more need headers that static hosts do not send
ort.env.wasm.wasmPaths = {mjs: new URL("ort-wasm.js", document.baseURI).href, wasm: new URL("ort-wasm.wasm", document.baseURI).href};

async function load(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is missing on the server (${response.status})`);
  return response;
}

// Adds a task from the bytes of a safetensors file: a length, a header in JSON, and tensors.
function addTask(bytes, name) {
  let header, told;
  try {
    const start = Number(new DataView(bytes).getBigUint64(0, true));
    header = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start)));
    told = JSON.parse(header.__metadata__.recast_pl);
    delete header.__metadata__;
    if (told.kind !== "feed") throw new Error();
    if (told.base !== about.base) throw new RangeError();
    const inputs = {};
    for (const [key, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
      const [type, Kind] = KINDS[dtype];
      inputs[key] = new ort.Tensor(type, new Kind(bytes.slice(8 + start + from, 8 + start + to)), shape);
    }
    if (!session.inputNames.every(key => key === "images" || key in inputs)) throw new RangeError();
    if (!tasks.has(told.task)) task.add(new Option(told.task));
    tasks.set(told.task, {inputs, classes: told.classes});
  } catch (cause) {
    throw new Error(name + (cause instanceof RangeError && told ? " is a task of another network" : " is not a task file"));
  }
  return told.task;
}

function softmax(logits) {
  const largest = Math.max(...logits), powers = Array.from(logits, value => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}

function show(name, probabilities, milliseconds) {
  const ranked = tasks.get(name).classes.map((label, k) => [label, probabilities[k]]).sort((a, b) => b[1] - a[1]);
  status_.textContent = `${ranked[0][0]}, ${percent(ranked[0][1])} (${Math.round(milliseconds)} ms)`;
  classes.caption.textContent = name;
  classes.tBodies[0].replaceChildren(...ranked.map(([label, probability]) => {
    const row = document.createElement("tr"), heading = document.createElement("th"), bar = document.createElement("div");
    Object.assign(heading, {textContent: label, scope: "row"});
    bar.className = "bar";
    bar.style.width = 100 * probability + "%";
    row.append(heading);
    row.insertCell().append(bar);
    row.insertCell().textContent = percent(probability);
    return row;
  }));
  classes.hidden = false;
}

function attempt(work) {  // one after another, as a session runs one image at a time
  error.textContent = "";
  running = running.then(work).catch(cause => { [error.textContent, status_.textContent] = [cause.message, ""]; });
  return running;
}

async function classify() {
  if (!image) return;
  const name = task.value, {height, width} = about.resize, start = performance.now();
  const images = new ort.Tensor("float32", pixels(image, height, width), [1, 3, height, width]);
  const {logits} = await session.run({images, ...tasks.get(name).inputs}, ["logits"]);
  show(name, softmax(logits.data), performance.now() - start);
}

function draw(source, width, height) {  // the pixels of an image on white
  const canvas = Object.assign(document.createElement("canvas"), {width, height}), context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, 0, 0);
  image = context.getImageData(0, 0, width, height);
  canvas.toBlob(blob => {
    URL.revokeObjectURL(shown.src);
    shown.src = URL.createObjectURL(blob);
    shown.hidden = false;
  });
}

async function take(chosen) {
  if (chosen.name.endsWith(".safetensors")) {
    task.value = addTask(await chosen.arrayBuffer(), chosen.name);
    status_.textContent = `Added the task ${task.value}`;
  } else {
    let bitmap;
    try {
      bitmap = await createImageBitmap(chosen, {colorSpaceConversion: "none"});
    } catch {
      throw new Error(`${chosen.name} cannot be read as an image`);
    }
    draw(bitmap, bitmap.width, bitmap.height);
  }
  await classify();
}

async function photograph() {  // the first press shows the camera, the second takes the picture
  if (video.hidden) {
    video.srcObject = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment"}});
  } else {
    draw(video, video.videoWidth, video.videoHeight);
    video.srcObject.getTracks().forEach(track => track.stop());
  }
  video.hidden = !video.hidden;
  camera.textContent = video.hidden ? "Use the camera" : "Take the picture";
  if (video.hidden) await classify();
}

attempt(async () => {
  about = await (await load("tasks.json")).json();
  session = await ort.InferenceSession.create(await (await load("bank.onnx")).arrayBuffer(), {executionProviders: ["wasm"]});
  const files = await Promise.all(about.tasks.map(async name => [await (await load(encodeURIComponent(name))).arrayBuffer(), name]));
  for (const [bytes, name] of files) addTask(bytes, name);
  status_.textContent = "Ready";
});
const takeAll = files => [...files].forEach(chosen => attempt(() => take(chosen)));
file.addEventListener("change", () => { takeAll(file.files); file.value = ""; });
task.addEventListener("change", () => attempt(classify));
camera.addEventListener("click", () => attempt(photograph));
camera.hidden = !navigator.mediaDevices;
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  addEventListener(name, event => {
    event.preventDefault();  // otherwise the browser would open the image in place of the page
    drop.classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") takeAll(event.dataTransfer.files);
  });
