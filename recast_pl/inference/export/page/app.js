"use strict";
const [task, drop, file, shown, camera, video, error, status_, facts, classes, offline] =
  ["task", "drop", "file", "shown", "camera", "video", "error", "status", "facts", "classes", "offline"]
    .map(id => document.getElementById(id));
const percent = share => (100 * share).toFixed(1) + " %";
const KINDS = {F32: ["float32", Float32Array], F16: ["float16", Uint16Array], U8: ["uint8", Uint8Array], I32: ["int32", Int32Array], I64: ["int64", BigInt64Array]};
const ANY = "auto";  // in place of a task that is to be found, as no task is named
const tasks = new Map();  // inputs of the graph and class names, by name
let about, session, router = null, image = null, running = Promise.resolve();

ort.env.wasm.numThreads = 1;  // more need headers that static hosts do not send
ort.env.wasm.wasmPaths = {mjs: new URL("ort-wasm.js", document.baseURI).href, wasm: new URL("ort-wasm.wasm", document.baseURI).href};

async function load(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is missing on the server (${response.status})`);
  return response;
}

function widen(halves) {  // numbers in half precision, which not all browsers know
  return Float32Array.from(halves, bits => {
    const exponent = bits >> 10 & 31, fraction = bits & 1023;
    return (bits >> 15 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -24 * fraction);
  });
}

// Reads a safetensors file: a length, a header in JSON, and tensors.
function read(bytes) {
  const start = Number(new DataView(bytes).getBigUint64(0, true)), tensors = {};
  const {__metadata__, ...header} = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 8, start)));
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    const [type, Kind] = KINDS[dtype], data = new Kind(bytes.slice(8 + start + from, 8 + start + to));
    tensors[name] = {type, shape, data: dtype === "F16" ? widen(data) : data};
  }
  return {told: JSON.parse(__metadata__.recast_pl), tensors};
}

function inputs(tensors) {  // those of a file that the graph receives
  const names = session.inputNames.filter(name => name in tensors);
  return Object.fromEntries(names.map(name => [name, new ort.Tensor(tensors[name].type, tensors[name].data, tensors[name].shape)]));
}

// Adds a task, or the router, from the bytes of its file; returns the task's name.
function add(bytes, name) {
  let told;
  try {
    const found = read(bytes);
    told = found.told;
    if (told.base !== about.base) throw new RangeError();
    if (told.kind === "router") return setRouter(new Router(found.tensors, told), found.tensors);
    if (told.kind !== "feed") throw new Error();
    const received = inputs(found.tensors);
    if (!session.inputNames.every(key => key === "images" || key in received)) throw new RangeError();
    if (!tasks.has(told.task)) task.add(new Option(told.task));
    tasks.set(told.task, {inputs: received, classes: told.classes});
  } catch (cause) {
    throw new Error(name + (cause instanceof RangeError && told ? " is a task of another network" : " is not a task file"));
  }
  return told.task;
}

function setRouter(found, tensors) {
  const start = inputs(Object.fromEntries(["numbers", "indices"].filter(name => name in tensors).map(name => [name, tensors[name]])));
  if (!router) task.add(new Option("find the task", ANY), 0);
  router = Object.assign(found, {start});
  task.value = ANY;
}

// What a task answers for an image, with the names and probabilities of its classes, most probable first.
async function ask(name, images) {
  const {inputs, classes} = tasks.get(name), {logits} = await session.run({images, ...inputs}, ["logits"]);
  const shares = softmax(logits.data), ranked = classes.map((label, k) => [label, shares[k]]).sort((a, b) => b[1] - a[1]);
  return {task: name, label: ranked[0][0], probability: ranked[0][1], ranked};
}

// The same of the task that is found, as `Predictor.predict` without a task: the second likeliest is asked, too.
async function find(images) {
  const [any] = tasks.values(), {features} = await session.run({images, ...any.inputs, ...router.start}, ["features"]);
  const {tasks: likeliest, familiar} = router.route(features.data), choices = [];
  for (const [place, [name, probability]] of likeliest.entries()) {
    const asked = familiar >= router.refuse && (!place || probability >= router.worth_a_look);
    choices.push({...(asked ? await ask(name, images) : {task: name}), taskProbability: probability});
  }
  const [first, second] = choices;
  if (!first.label) return {task: null, familiar, second: first};
  const swap = second?.label && second.taskProbability * second.probability > first.taskProbability * first.probability;
  return swap ? {...second, familiar, second: first} : {...first, familiar, second};
}

function explain({task, taskProbability, familiar, second}) {  // how the task was found
  const other = second && `${second.task}, ${percent(second.taskProbability)}`
    + (second.label ? `: ${second.label}, ${percent(second.probability)}` : "");
  const rows = task ? [["Task", `${task}, ${percent(taskProbability)}`], ["Second choice", other]]
    : [["Task", "none of these"], ["Likeliest", other]];
  rows.push(["At least as unusual", `${percent(familiar)} of known images`]);
  facts.replaceChildren(...rows.filter(([, fact]) => fact).flatMap(row => row.map((text, place) =>
    Object.assign(document.createElement(place ? "dd" : "dt"), {textContent: text}))));
}

function show(found, milliseconds) {
  const answer = found.task ? `${found.label}, ${percent(found.probability)}` : "None of these tasks";
  status_.textContent = `${answer} (${Math.round(milliseconds)} ms)`;
  if ("familiar" in found) explain(found);
  facts.hidden = !("familiar" in found);
  classes.caption.textContent = found.task ?? "";
  classes.tBodies[0].replaceChildren(...(found.ranked ?? []).map(([label, probability]) => {
    const row = document.createElement("tr"), heading = document.createElement("th"), bar = document.createElement("div");
    Object.assign(heading, {textContent: label, scope: "row"});
    bar.className = "bar";
    bar.style.width = 100 * probability + "%";
    row.append(heading);
    row.insertCell().append(bar);
    row.insertCell().textContent = percent(probability);
    return row;
  }));
  classes.hidden = !found.task;
}

function attempt(work) {  // one after another, as a session runs one image at a time
  error.textContent = "";
  running = running.then(work).catch(cause => { [error.textContent, status_.textContent] = [cause.message, ""]; });
  return running;
}

async function classify() {
  if (!image) return;
  const {height, width} = about.resize, start = performance.now();
  const images = new ort.Tensor("float32", pixels(image, height, width), [1, 3, height, width]);
  show(await (task.value === ANY ? find(images) : ask(task.value, images)), performance.now() - start);
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
    task.value = add(await chosen.arrayBuffer(), chosen.name) ?? ANY;
    const hidden = router && !router.tasks.includes(task.value) && task.value !== ANY;
    status_.textContent = `Added the task ${task.value}` + (hidden ? ", which is used where you choose it, and is not found" : "");
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
    await video.play();  // before this its size is unknown
  } else {
    draw(video, video.videoWidth, video.videoHeight);
    video.srcObject.getTracks().forEach(track => track.stop());
  }
  video.hidden = !video.hidden;
  camera.textContent = video.hidden ? "Use the camera" : "Take the picture";
  if (video.hidden) await classify();
}

// Keeps the page in the browser, where that allows it: on https and localhost.
async function stay() {
  if (!session || !navigator.serviceWorker) return;
  const registration = await navigator.serviceWorker.register("worker.js").catch(() => null);
  if (!registration) return;
  const replace = () => {
    if (!registration.waiting || !registration.active) return;
    registration.waiting.postMessage("replace");  // this page has loaded all it needs of the one before
    offline.textContent = "There is a newer version of this page. Load it again to use it.";
  };
  const watch = () => registration.installing?.addEventListener("statechange", replace);
  registration.addEventListener("updatefound", watch);
  watch();
  replace();
  await navigator.serviceWorker.ready;
  offline.textContent ||= "This page is kept in the browser, and works without a network.";
}

attempt(async () => {
  about = await (await load("tasks.json")).json();
  session = await ort.InferenceSession.create(await (await load("bank.onnx")).arrayBuffer(), {executionProviders: ["wasm"]});
  const files = await Promise.all(about.files.map(async name => [await (await load(encodeURIComponent(name))).arrayBuffer(), name]));
  for (const [bytes, name] of files) add(bytes, name);
  status_.textContent = "Ready";
}).then(stay);
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
